"""The engine: one thread that schedules, runs and publishes, step after step.

Other threads reach it through its inbox alone (submit, abort, call), and it reaches them through their handles. So the
scheduler, the blocks and the block tables need no locks.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any, TypeVar

from core.batching.breaker import CircuitBreaker
from core.batching.cohorts import CohortPolicy
from core.batching.output import Detokenizer, RequestHandle, Sink
from core.batching.publisher import EngineMetrics, Publisher
from core.batching.scheduler import Scheduler
from core.batching.sequence import Request
from core.batching.stats import BatcherStats, StatsKeeper
from core.errors import (
    ConflictError,
    EngineDeadError,
    PageMoveError,
    QueueFullError,
    UnavailableError,
    VRAMancerError,
)
from core.execution.schedule import Runner, SchedulerOutput, StepOutput
from core.logs import get_logger

T = TypeVar("T")
CALL_S = 30.0
"""How long a caller waits for its turn between two steps."""
UPKEEP_S = 0.25
"""How often an engine without work looks after memory that is lent."""
MEMORY_WAIT_S = 30.0
"""How long a request waits for memory that was taken back while nothing else could give it room."""
logger = get_logger(__name__)


@dataclass(slots=True)
class _Call:
    """Work for the engine thread between two steps."""

    function: Callable[[], Any]
    future: Future[Any]


@dataclass(slots=True)
class _Abort:
    request_id: str


@dataclass(slots=True)
class _Done:
    """A step that was in flight has come back."""

    output: SchedulerOutput
    result: StepOutput | Exception


@dataclass(slots=True)
class _Loaded:
    """What a sequence was waiting for is in main memory."""

    seq_id: int


class _Stop:
    """End the thread once the steps in flight have come back."""


class ContinuousBatcher:
    """Requests join and leave at every step. `start` it once, `stop` it once."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        detokenizer: Detokenizer,
        *,
        max_queue: int,
        breaker: CircuitBreaker,
        policy: CohortPolicy,
    ) -> None:
        self.scheduler = scheduler
        self.breaker = breaker
        self.error: BaseException | None = None
        self._runner = runner
        self._max_queue = max_queue
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._ids: set[str] = set()
        self._arrivals = 0
        self._dead = False
        self._reason: VRAMancerError | None = None  # of a stop
        self._stats = StatsKeeper(scheduler)
        self._policy = policy
        self._in_flight = 0
        self._starved = False  # sequences wait for memory that was taken back, and nothing else runs
        self._starved_since_s: float | None = None
        self._calls: list[_Call] = []
        inbox, ids, lock = self._inbox, self._ids, self._lock

        def release(request_id: str) -> None:  # the request is over; its id may be used again
            with lock:
                ids.discard(request_id)

        # Neither refers to this object, so that it goes with its last user.
        self._release = release
        scheduler.waiting.on_loaded = lambda seq_id: inbox.put(_Loaded(seq_id))
        self._publisher = Publisher(scheduler, detokenizer, release)
        self._thread = threading.Thread(target=self._run, name="vrm-engine", daemon=True)

    # -- any thread -------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._dead

    @property
    def stats(self) -> BatcherStats:
        return self._stats.current

    @property
    def num_unfinished(self) -> int:
        """Requests submitted and not finished."""
        return len(self._ids)

    def matching(self, request_id: str) -> list[str]:
        """Unfinished requests with this id, or submitted together under it."""
        with self._lock:
            if request_id in self._ids:
                return [request_id]
            return [name for name in self._ids if name.rpartition("-")[0] == request_id]

    def start(self) -> None:
        self._thread.start()

    def report_to(self, metrics: EngineMetrics) -> None:
        """From now on tell `metrics` of tokens and finished requests."""
        self._publisher.metrics = metrics

    def submit(self, requests: list[Request], *, sink: Sink | None = None) -> list[RequestHandle]:
        """Queue requests, all or none. Raises `QueueFullError`, `CircuitOpenError`, and once the engine has ended
        `EngineDeadError` or the reason of its `stop`."""
        self.breaker.check()
        with self._lock:
            if self._dead:
                raise self._death()
            if len(self._ids) + len(requests) > self._max_queue + self.scheduler.limits.max_batch_size:
                raise QueueFullError(
                    f"{len(self._ids)} requests are running or waiting, and the queue takes {self._max_queue} beside "
                    f"{self.scheduler.limits.max_batch_size} running ones; try again later.",
                    retry_after_s=self._retry_after_s(),
                )
            taken = self._ids.intersection(request.request_id for request in requests)
            if taken:
                raise ConflictError(f"A request with id {sorted(taken)[0]} is running already.")
            self._ids.update(request.request_id for request in requests)
            handles = []
            for index, request in enumerate(requests):
                request.arrival = self._arrivals
                self._arrivals += 1
                request.submitted_s = time.monotonic()
                handles.append(RequestHandle(request.request_id, request.params, self.abort, sink, index))
                self._inbox.put((request, handles[-1]))
        return handles

    def _retry_after_s(self) -> float:
        """Guess from the measured rate: when a queued request's worth of tokens has been produced."""
        rate = self.stats.tokens_per_s
        return max(1.0, min(60.0, 64.0 / rate)) if rate > 0 else 1.0

    def abort(self, request_id: str) -> None:
        self._inbox.put(_Abort(request_id))

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function on the engine thread between two steps, when none is in flight."""
        future: Future[T] = Future()
        with self._lock:
            if self._dead:
                raise self._death()
            self._inbox.put(_Call(function, future))
        return future

    def call_within(self, function: Callable[[], T], timeout_s: float | None = None) -> T:
        """`call`, and wait for the result. What has not begun within `timeout_s` (None: `CALL_S`) never will: raises
        `UnavailableError`. What has is waited for."""
        future, timeout_s = self.call(function), CALL_S if timeout_s is None else timeout_s
        try:
            return future.result(timeout_s)
        except FutureTimeoutError:
            if future.cancel():
                said = f"The engine has not come to it within {timeout_s:g} s, so nothing was done; try again later."
                raise UnavailableError(said) from None
        return future.result()

    def stop(self, *, drain_s: float = 0.0, reason: VRAMancerError | None = None) -> None:
        """Let requests finish for up to `drain_s`, then fail what is left and end the thread. `reason` is what clients
        are told whose requests are left or come later; without one, an `EngineDeadError`."""
        self._reason = reason
        deadline = time.monotonic() + drain_s
        while self._ids and self.alive and time.monotonic() < deadline:
            time.sleep(0.02)
        self._inbox.put(_Stop())
        if self._thread.ident is not None:
            self._thread.join()

    def _death(self) -> VRAMancerError:
        if self.error is None and self._reason is not None:
            return type(self._reason)(self._reason.message)  # one for each client that raises it
        reason = f": {self.error}" if self.error is not None else ""
        return EngineDeadError(f"The engine has stopped{reason}.")

    # -- the engine thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._read_inbox():
                self._fill()
        except BaseException as error:  # the thread's last words: whatever it was, waiting clients must hear of it
            self.error = error
            logger.error("engine stopped", error=repr(error), exc_info=True)
        finally:
            self._die()

    def _fill(self) -> None:
        """Put as many steps in flight as are wanted now. One alone runs here, without a change of threads."""
        if not self._keep_house():
            return
        while not self._calls:
            scheduler = self.scheduler
            choice = self._policy.choose(scheduler.num_decoding, scheduler.mean_context, scheduler.prompt_tokens_left)
            if self._in_flight >= choice.cohorts:
                return
            output = scheduler.schedule(choice.cohorts, choice.chunk)
            if output is None:
                self._starved = scheduler.has_work and not self._in_flight
                if self._starved:
                    self._wait_for_memory()
                elif not (scheduler.num_running or scheduler.num_waiting):
                    self._starved_since_s = None  # whoever waited has gone
                return
            self._starved, self._starved_since_s = False, None
            if choice.cohorts == 1:
                self._complete(output, self._execute(output))
                return
            self._in_flight += 1
            self._runner.submit(output, self._arrived)

    def _wait_for_memory(self) -> None:
        """Nothing can run, because memory that was lent has been taken back. Whoever is next is told so if it does not
        return in time."""
        kv, now_s = self.scheduler.kv, time.monotonic()
        if not kv.is_short:
            raise RuntimeError("sequences wait, but none of them can be scheduled")
        self.move_pages()  # no step will carry them, and lenders wait
        if self._starved_since_s is None:
            self._starved_since_s = now_s
        if now_s - self._starved_since_s < MEMORY_WAIT_S:
            return
        self._starved_since_s = None
        sequence = next(iter(self.scheduler.live_sequences()), None)
        if sequence is None:
            return
        tokens, room = len(sequence.token_ids), kv.pool.limit * kv.block_size
        message = f"The request has {tokens} tokens, and since memory was taken back the devices hold {room}."
        self._publisher.fail([sequence], UnavailableError(message, retry_after_s=MEMORY_WAIT_S))

    def _keep_house(self) -> bool:
        """Between two steps: memory is borrowed and given back. False while nothing may be computed."""
        scheduler = self.scheduler
        scheduler.kv.tick(scheduler.waiting_blocks)
        scheduler.keep_to_limit()
        scheduler.drop_unwanted()
        if scheduler.kv.wants_stop or not scheduler.has_work:
            if self._in_flight:
                return not scheduler.kv.wants_stop
            self.move_pages()
        return not scheduler.kv.wants_stop

    def move_pages(self) -> bool:
        """In the engine thread, or once that has ended, while nothing is in flight: pages that wait to be moved are
        moved now. False if that failed, and with it everything that runs."""
        output = self.scheduler.upkeep()
        if output is None:
            return True
        result = self._execute(output)
        if isinstance(result, Exception):
            logger.error("pages could not be moved", exc_info=result)
            self._publisher.fail(self.scheduler.fail_all(output), result)
            return False
        self.scheduler.kv.step_done(output.step)
        return True

    def _arrived(self, output: SchedulerOutput, result: StepOutput | Exception) -> None:
        """Called by the runner's threads."""
        self._inbox.put(_Done(output, result))

    def _read_inbox(self) -> bool:
        """Take in what arrived, waiting for something if there is nothing to run. False ends the loop."""
        kv = self.scheduler.kv
        starved, self._starved = self._starved, False
        block = self._in_flight > 0 or starved or not (self.scheduler.has_work or kv.wants_stop)
        timeout_s = None if self._in_flight or (kv.is_idle and not starved) else UPKEEP_S
        while True:
            try:
                message = self._inbox.get(block=block, timeout=timeout_s if block else None)
            except queue.Empty:
                return True
            if isinstance(message, _Stop):
                self._drain()
                return False
            self._take(message)
            if isinstance(message, _Call) and not self.scheduler.kv.is_idle:
                return True  # callers that keep calling must not keep memory from going back
            block = not (self.scheduler.has_work or self._in_flight or self.scheduler.kv.wants_stop)

    def _take(self, message: _Done | _Abort | _Call | _Loaded | tuple[Request, RequestHandle]) -> None:
        if isinstance(message, _Done):
            self._in_flight -= 1
            self._complete(message.output, message.result)
        elif isinstance(message, _Abort):
            if self._publisher.abort(message.request_id):
                self._stats.refresh_counts()
        elif isinstance(message, _Call):
            self._calls.append(message)
        elif isinstance(message, _Loaded):
            self.scheduler.waiting.loaded(message.seq_id)
        elif self._publisher.open(*message):
            self.scheduler.add(message[0])
        while self._calls and not self._in_flight:
            self._call_now(self._calls.pop(0))

    def _drain(self) -> None:
        """Wait for the steps in flight; whatever else arrived is left for `_die`."""
        others = []
        while self._in_flight:
            message = self._inbox.get()
            if isinstance(message, _Done):
                self._take(message)
            else:
                others.append(message)
        for message in others:
            self._inbox.put(message)

    def _call_now(self, call: _Call) -> None:
        if not call.future.set_running_or_notify_cancel():
            return
        try:
            call.future.set_result(call.function())
        except Exception as error:  # noqa: BLE001  handed to the caller, who waits on the future
            call.future.set_exception(error)

    def _execute(self, output: SchedulerOutput) -> StepOutput | Exception:
        try:
            return self._runner.execute(output)
        except Exception as error:  # noqa: BLE001  any failure of a forward pass is this batch's alone
            return error

    def _complete(self, output: SchedulerOutput, result: StepOutput | Exception) -> None:
        """Publish what a step produced; if it failed, its sequences fail and the engine goes on."""
        if isinstance(result, Exception):
            logger.error("step failed", step=output.step, sequences=len(output.sequences), exc_info=result)
            self.breaker.record_failure(repr(result))
            end = self.scheduler.fail_all if isinstance(result, PageMoveError) else self.scheduler.fail
            self._publisher.fail(end(output), result)
        else:
            self.breaker.record_success()
            self._publisher.publish(self.scheduler.update_from_output(output, result))
        self._stats.step_done(output, None if isinstance(result, Exception) else result, self.breaker.last_error)

    def _die(self) -> None:
        """Refuse what comes and fail what waits."""
        with self._lock:
            self._dead = True
        error = self._death()
        self._publisher.fail_everything(error)
        for call in self._calls:
            self._inbox.put(call)
        while True:
            try:
                message = self._inbox.get(block=False)
            except queue.Empty:
                return
            if isinstance(message, _Call):
                if message.future.set_running_or_notify_cancel():
                    message.future.set_exception(error)
            elif isinstance(message, tuple):
                message[1].put(error)
                self._release(message[0].request_id)
