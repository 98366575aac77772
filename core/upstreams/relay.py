"""A request's way through the replicas of its model: which one is asked, and what happens when it fails."""

from __future__ import annotations

from collections.abc import Iterator

from core.errors import QueueFullError, UnavailableError, UpstreamError, VRAMancerError
from core.logs import get_logger
from core.upstreams.call import Answer, Call, Job
from core.upstreams.group import Group
from core.upstreams.replica import Replica
from core.upstreams.takeover import Told, is_determined
from core.upstreams.transport import Transport

log = get_logger(__name__)

ELSEWHERE = (UpstreamError, UnavailableError, QueueFullError)
"""Failures after which another replica may do."""


class Relay:
    """One request, which is not for our own engine or may go elsewhere if that fails. Close it."""

    def __init__(self, group: Group, transport: Transport, job: Job) -> None:
        self._group = group
        self._transport = transport
        self._job = job
        self._tried: list[Replica] = []
        self._call: Call | None = None
        self._events: Iterator[tuple[bytes, dict[str, object]] | None] = iter(())
        self._told = Told()
        self.failure: VRAMancerError | None = None

    def next_replica(self) -> tuple[Replica, int] | None:
        """Whom to ask now, and how many tokens of the prompt are probably cached there; None: all were asked."""
        found = next(self._group.order(self._job.prompt, self._tried), None)
        if found is not None:
            self._tried.append(found[0])
            self._group.routed(found[0], self._job.prompt)
        return found

    def failed(self, replica: Replica, error: VRAMancerError) -> None:
        """A replica did not begin an answer, so that another one may."""
        self.failure = error
        self._group.lost(replica, busy=isinstance(error, QueueFullError))
        log.warning("replica failed", model=self._group.name, replica=replica.name, error=error.message)

    def whole(self, replica: Replica, cached_tokens: int) -> Iterator[Answer | None]:
        """The answer of this replica; None whenever there is nothing yet. Raises what `Call` does."""
        self._call = Call(replica, self._transport, self._job, cached_tokens)
        try:
            yield from self._call.whole()
        finally:
            self._call.close()

    def events(self, replica: Replica, cached_tokens: int) -> Iterator[bytes | None]:
        """The events of the answer, without `[DONE]`; None whenever there is nothing yet. If this replica is lost on
        the way, others go on where that is exact. Raises what `Call` does."""
        while True:
            call = Call(replica, self._transport, self._job, cached_tokens)
            try:
                for event in call.events():
                    if event is not None and len(self._tried) > 1:
                        event = self._told.rest(*event)
                    if event is None:
                        yield None
                        continue
                    self._told.add(event[1])
                    yield event[0]
            except ELSEWHERE as error:
                found = self._other(replica, error)
                if found is None:
                    raise
            else:
                return
            finally:
                call.close()
            replica, cached_tokens = found

    def _other(self, replica: Replica, error: VRAMancerError) -> tuple[Replica, int] | None:
        """Who may go on with the stream; None: nobody."""
        exact = self._told.comparable and is_determined(self._job.body)
        if not self._told.nothing and not (exact and replica.kind == "vramancer"):
            return None
        for found, cached_tokens in self._group.order(self._job.prompt, self._tried):
            if found.is_self or not (self._told.nothing or found.kind == "vramancer"):
                continue
            self._tried.append(found)
            self.failed(replica, error)
            self._group.routed(found, self._job.prompt)
            self._told.begin_again()
            return found, cached_tokens
        return None
