"""All models that other servers answer for, by name; and the thread that looks at these servers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from core.config import BackendSettings, UpstreamSettings
from core.errors import ConflictError, NotFoundError, UpstreamError
from core.logs import get_logger
from core.upstreams.call import Job
from core.upstreams.group import Group, GroupView
from core.upstreams.probe import probe
from core.upstreams.relay import Relay
from core.upstreams.replica import Replica, Reported
from core.upstreams.transport import Timeouts, Transport

log = get_logger(__name__)

MAX_UPSTREAMS = 1024


class Upstreams:
    """Thread-safe. `own` says how loaded our own model is; None: it cannot serve. Without upstreams nothing runs."""

    def __init__(self, settings: BackendSettings, own: Callable[[], Reported | None] = lambda: None) -> None:
        self.settings = settings
        self.transport = Transport()
        self.timeouts = Timeouts(settings.connect_timeout_s, settings.read_timeout_s)
        self._own = own
        self._lock = threading.Lock()
        self.named: Mapping[str, Group] = {}
        """By what clients call the model; replaced, never changed."""
        self._prober: threading.Thread | None = None
        self._closing = threading.Event()
        names = dict.fromkeys(upstream.name for upstream in settings.upstreams)
        for name in names:
            replicas = [Replica(upstream, settings) for upstream in settings.upstreams if upstream.name == name]
            self.named = {**self.named, name: Group(name, replicas, own)}
        if self.named:
            self._watch()

    def find(self, name: object) -> Group | None:
        """The model that clients call so, if other servers answer for it."""
        return self.named.get(name) if isinstance(name, str) else None

    def groups(self) -> list[Group]:
        return list(self.named.values())

    def views(self) -> tuple[GroupView, ...]:
        return tuple(group.view() for group in self.named.values())

    def relay(self, group: Group, job: Job) -> Relay:
        """A request's way to one of the replicas. Before the first one, replicas that nobody has looked at yet are."""
        if any(replica.reachable is None and not replica.is_self for replica in group.replicas):
            self.look(group)
        return Relay(group, self.transport, job)

    def add(self, upstream: UpstreamSettings) -> Group:
        """Take a server in, as a new model or one more replica, after a look at it.

        Raises:
            ConflictError: it is here already, or there are too many.
            UpstreamError: it cannot be reached, or has not that model.
        """
        replica = Replica(upstream, self.settings)
        if not replica.is_self:
            probe([replica], self.transport, self.settings.connect_timeout_s)
            if not replica.reachable:
                raise UpstreamError(f"{upstream.url} cannot be used: {replica.trouble}", code="upstream_unusable")
        with self._lock:
            present = self.named.get(upstream.name)
            replicas = present.replicas if present is not None else ()
            if any(replica.name == other.name for other in replicas):
                raise ConflictError(f"{upstream.name} is served by {upstream.url} already.")
            if sum(len(group.replicas) for group in self.named.values()) >= MAX_UPSTREAMS:
                raise ConflictError(f"There are {MAX_UPSTREAMS} upstreams, as many as this server takes.")
            group = Group(upstream.name, (*replicas, replica), self._own)
            self.named = {**self.named, upstream.name: group}
            self._watch()
        log.info("upstream added", model=upstream.name, url=upstream.url, backend=replica.kind)
        return group

    def remove(self, name: str) -> None:
        """Requests for it that are under way go on. Raises `NotFoundError`."""
        with self._lock:
            if name not in self.named:
                raise NotFoundError(f"No other server answers for a model '{name}'.", param="model")
            self.named = {other: group for other, group in self.named.items() if other != name}
        log.info("upstream removed", model=name)

    def look(self, group: Group | None = None) -> None:
        """Look at all servers now, or at those of one model."""
        groups = self.groups() if group is None else [group]
        replicas = [replica for each in groups for replica in each.replicas if not replica.is_self]
        before = [replica.reachable for replica in replicas]
        probe(replicas, self.transport, self.settings.connect_timeout_s)
        for replica, was in zip(replicas, before, strict=True):
            if replica.reachable is not was:
                write = log.info if replica.reachable else log.warning
                write("upstream", model=replica.settings.name, url=replica.settings.url, reachable=replica.reachable,
                      trouble=replica.trouble)  # fmt: skip

    def _watch(self) -> None:
        if self._prober is None and not self._closing.is_set():
            self._prober = threading.Thread(target=self._look_often, name="vrm-upstream-probes", daemon=True)
            self._prober.start()

    def _look_often(self) -> None:
        while True:
            try:
                self.look()
            except UpstreamError:  # the transport is closed
                return
            if self._closing.wait(self.settings.probe_interval_s):
                return

    def close(self) -> None:
        """End all calls and the thread. Safe to call twice."""
        self._closing.set()
        self.transport.close()
        if self._prober is not None:
            self._prober.join()
