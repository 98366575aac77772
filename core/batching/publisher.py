"""What a step did to sequences becomes what their clients get: outputs, errors, and the end of a request."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, TypeAlias

from core.batching.output import Detokenizer, RequestHandle, RequestWriter
from core.batching.scheduler import Scheduler
from core.batching.sequence import Request, Sequence, SequenceUpdate
from core.errors import StepFailedError, VRAMancerError
from core.logs import get_logger
from core.request import FinishedRequest, SequenceDelta

logger = get_logger(__name__)


Answers: TypeAlias = "dict[str, list[SequenceDelta]]"
"""What a step adds to requests, by their ids."""


class RequestObserver(Protocol):
    """Told of each request that ends, on the engine thread: it has to be quick, and raises nothing."""

    def observe_finished(self, request: FinishedRequest) -> None: ...


class EngineMetrics(RequestObserver, Protocol):
    """Told of tokens, too. `trace_id` is empty where no trace is recorded."""

    def observe_first_token(self, seconds: float, prompt_tokens: int, request_id: str, trace_id: str) -> None: ...

    def observe_tokens(self, count: int, seconds: float | None) -> None: ...


class Publisher:
    """Writes to the handles of all requests that the scheduler has, and ends those that are done for. Used by the
    engine thread alone. `on_end` is told the id of a request that is over.
    """

    def __init__(self, scheduler: Scheduler, detokenizer: Detokenizer, on_end: Callable[[str], None]) -> None:
        self.metrics: EngineMetrics | None = None
        self.observers: tuple[RequestObserver, ...] = ()
        self._scheduler = scheduler
        self._detokenizer = detokenizer
        self._on_end = on_end
        self._writers: dict[str, RequestWriter] = {}

    def open(self, request: Request, handle: RequestHandle) -> bool:
        """From now on write this request's outputs. False: it cannot be started, and its client has been told."""
        try:
            self._writers[request.request_id] = RequestWriter(request, handle, self._detokenizer)
        except Exception as error:  # noqa: BLE001  whatever is wrong with this request is its own affair
            handle.put(_as_failure("The request could not be started", error))
            self._on_end(request.request_id)
            return False
        return True

    def take(self, writer: RequestWriter) -> None:
        """Go on writing where another publisher has left off."""
        self._writers[writer.request.request_id] = writer

    def release(self) -> list[RequestWriter]:
        """All writers, in the order of their requests' arrival; another publisher goes on with them."""
        writers = sorted(self._writers.values(), key=lambda writer: writer.request.arrival)
        self._writers.clear()
        return writers

    def prepare(self, updates: list[SequenceUpdate]) -> Answers:
        """Turn a step's tokens into what each request gets, and end the sequences that they end."""
        deltas: Answers = {}
        for update in updates:
            writer = self._writers.get(update.sequence.request.request_id)
            if writer is None:
                continue  # a sibling failed in this step, and the request with it
            if update.error is not None:
                deltas.pop(writer.request.request_id, None)
                self._fail_request(writer, update.error)
                continue
            try:
                new = self._deltas_of(writer, update)
            except Exception as error:  # noqa: BLE001  text that cannot be made fails its own request alone
                deltas.pop(writer.request.request_id, None)
                self._fail_request(writer, _as_failure("The answer could not be decoded", error))
                continue
            deltas.setdefault(writer.request.request_id, []).extend(new)
        return deltas

    def send(self, answers: Answers) -> None:
        """Give requests what was prepared, one message each."""
        for request_id, mine in answers.items():
            writer = self._writers[request_id]
            if mine:
                self._observe_tokens(writer, sum(len(delta.token_ids) for delta in mine))
            if writer.request.finished:
                self._close(writer, mine)
            else:
                writer.write(mine)

    def _deltas_of(self, writer: RequestWriter, update: SequenceUpdate) -> list[SequenceDelta]:
        """What a token adds to the answer, and the closing delta if it was the last; nothing if there is no token."""
        if update.token_id is None:
            return []
        delta, matched_stop = writer.token(update)
        if matched_stop is not None:
            self._scheduler.finish(update.sequence, "stop", matched_stop)
        closing = writer.ended(update.sequence) if update.sequence.finished else None
        return [delta] if closing is None else [delta, closing]

    def _observe_tokens(self, writer: RequestWriter, count: int) -> None:
        now_s, before_s, request = time.monotonic(), writer.last_token_s, writer.request
        writer.last_token_s = now_s
        if before_s is None:
            writer.first_token_s = now_s
        if self.metrics is None:
            return
        if before_s is None:
            waited_s, prompt_tokens = now_s - request.submitted_s, len(request.prompt_token_ids)
            trace_id = request.traced.context.trace_id if request.traced is not None else ""
            self.metrics.observe_first_token(waited_s, prompt_tokens, request.request_id, trace_id)
        self.metrics.observe_tokens(count, now_s - before_s if before_s is not None else None)

    def abort(self, request_id: str) -> bool:
        """End a request with what it has. False if there is none of this id."""
        writer = self._writers.get(request_id)
        if writer is None:
            return False
        for sequence in writer.request.sequences:
            self._scheduler.finish(sequence, "abort")
        self._close(writer, [])
        return True

    def fail(self, sequences: list[Sequence], error: Exception) -> None:
        """The step of these sequences failed: so do their requests."""
        message = _as_failure("The forward pass failed", error)
        for sequence in sequences:
            writer = self._writers.get(sequence.request.request_id)
            if writer is not None:
                self._fail_request(writer, message)

    def _fail_request(self, writer: RequestWriter, error: VRAMancerError) -> None:
        for sibling in writer.request.sequences:
            self._scheduler.finish(sibling, "error")
        self._forget(writer, "error")
        writer.handle.put(error)

    def fail_everything(self, error: VRAMancerError) -> None:
        """The engine ends: clients are told before anything else is tried."""
        writers = list(self._writers.values())
        for writer in writers:
            writer.handle.put(error)
        for writer in writers:
            try:
                for sequence in writer.request.sequences:
                    self._scheduler.finish(sequence, "error")
            except Exception as failure:  # the engine may have died of what its books say
                logger.error("a request could not be ended in order", exc_info=failure)
            self._forget(writer, "error")

    def _close(self, writer: RequestWriter, deltas: list[SequenceDelta]) -> None:
        """Send the last output of a request, with a closing delta for each sequence that had none."""
        for sequence in writer.request.sequences:
            closing = writer.ended(sequence)
            if closing is not None:
                deltas.append(closing)
        self._forget(writer, str(writer.request.sequences[0].finish_reason))
        writer.write(deltas)

    def _forget(self, writer: RequestWriter, reason: str) -> None:
        request = writer.request
        del self._writers[request.request_id]
        self._on_end(request.request_id)
        if not self.observers:
            return
        traced = request.traced
        finished = FinishedRequest(
            request.request_id,
            reason,
            prompt_tokens=len(request.prompt_token_ids),
            output_tokens=sum(len(sequence.output_token_ids) for sequence in request.sequences),
            submitted_s=request.submitted_s,
            started_s=request.started_s,
            first_token_s=writer.first_token_s,
            ended_s=time.monotonic(),
            cached_tokens=request.num_cached_tokens,
            preemptions=sum(sequence.num_preemptions for sequence in request.sequences),
            trace=traced.context if traced is not None else None,
            work=traced.work() if traced is not None else (),
        )
        for observer in self.observers:
            observer.observe_finished(finished)


def _as_failure(what: str, error: Exception) -> VRAMancerError:
    return error if isinstance(error, VRAMancerError) else StepFailedError(f"{what}: {error}")
