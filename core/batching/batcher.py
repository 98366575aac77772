"""The engine: one thread that schedules, runs and publishes, step after step.

Other threads reach it through its inbox alone (submit, abort, call), and it reaches them through their handles. So the
scheduler, the blocks and the block tables need no locks.
"""

from __future__ import annotations

import copy
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from core.batching.cohorts import CohortPolicy
from core.batching.intake import Abort, Call, CircuitBreaker, Intake, Load
from core.batching.output import Detokenizer, RequestHandle, Sink
from core.batching.publisher import Answers, EngineMetrics, Publisher, RequestObserver
from core.batching.scheduler import Scheduler
from core.batching.sequence import Request
from core.batching.stats import BatcherStats, StatsKeeper
from core.errors import (
    ContextLengthError,
    DeviceLostError,
    EngineDeadError,
    EngineMovedError,
    OutOfDeviceMemoryError,
    PageMoveError,
    UnavailableError,
    VRAMancerError,
)
from core.execution.records import Runner, SchedulerOutput, StepOutput
from core.logs import get_logger

T = TypeVar("T")
UPKEEP_S = 0.25
"""How often an engine without work looks after memory that is lent."""
MEMORY_WAIT_S = 30.0
"""How long a request waits for memory that was taken back while nothing else could give it room."""
logger = get_logger(__name__)


@dataclass(slots=True)
class _Done:
    """A step that was in flight has come back."""

    output: SchedulerOutput
    result: StepOutput | Exception


@dataclass(slots=True)
class _Loaded:
    """What a sequence was waiting for is in main memory."""

    seq_id: int


@dataclass(frozen=True, slots=True)
class _Stop:
    """End the thread with this number once the steps in flight have come back; `parked`: everything stays as it is."""

    thread: int
    parked: bool = False


class ContinuousBatcher:
    """Requests join and leave at every step. `start` it once, `stop` it once.

    Between, it can be parked: its thread ends between two steps, requests wait where they are, and new ones queue up.
    Then `resume` goes on, or another batcher `adopt`s the requests: their clients see nothing of it but a pause.
    `on_lost` is asked when a device does not answer: True, and the batcher parks itself, since somebody will see to it.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        detokenizer: Detokenizer,
        *,
        max_queue: int,
        max_queued_tokens: int,
        breaker: CircuitBreaker,
        policy: CohortPolicy,
    ) -> None:
        self.scheduler = scheduler
        self.breaker = breaker
        self.error: BaseException | None = None
        self.on_lost: Callable[[DeviceLostError], bool] = lambda error: False
        self._runner = runner
        batch = scheduler.limits.max_batch_size
        room = f"the queue takes {max_queue} beside {batch} running ones"
        self.intake = Intake(Load(max_queue + batch, max_queued_tokens), room)
        self._inbox = inbox = self.intake.inbox
        self._publisher = Publisher(scheduler, detokenizer, self.intake.release)
        self._reason: VRAMancerError | None = None  # of a stop
        self._stats = StatsKeeper(scheduler)
        self._policy = policy
        self._in_flight = 0
        self._starved = False  # sequences wait for memory that was taken back, and nothing else runs
        self._starved_since_s: float | None = None
        self._calls: list[Call] = []
        self._parked = False
        self._threads = 1
        # Does not refer to this object, so that it goes with its last user.
        scheduler.waiting.on_loaded = lambda seq_id: inbox.put(_Loaded(seq_id))
        self._thread = self._new_thread()

    def _new_thread(self) -> threading.Thread:
        return threading.Thread(target=self._run, name="vrm-engine", daemon=True)

    # -- any thread -------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether requests are taken and served, or will be."""
        return not self.intake.is_closed and (self._parked or self._thread.is_alive())

    @property
    def stats(self) -> BatcherStats:
        return self._stats.current

    @property
    def num_unfinished(self) -> int:
        """Requests submitted and not finished."""
        return self.intake.num_unfinished

    def start(self) -> None:
        self._thread.start()

    def report_to(self, metrics: EngineMetrics, others: tuple[RequestObserver, ...] = ()) -> None:
        """From now on tell `metrics` of tokens and finished requests, and `others` of finished requests."""
        self._publisher.metrics, self._publisher.observers = metrics, (metrics, *others)

    def submit(self, requests: list[Request], *, sink: Sink | None = None) -> list[RequestHandle]:
        """Queue requests, all or none. Raises `InvalidRequestError` for more than there is ever room for,
        `QueueFullError`, `CircuitOpenError`, once the engine has ended `EngineDeadError` or the reason of its `stop`,
        and `EngineMovedError` if another batcher has taken over."""
        self.breaker.check()
        return self.intake.submit(requests, self.stats.retry_after_s, sink)

    def abort(self, request_id: str) -> None:
        self.intake.abort(request_id)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function on the engine thread between two steps, when none is in flight."""
        return self.intake.call(function)

    def stop(self, *, drain_s: float = 0.0, reason: VRAMancerError | None = None) -> None:
        """Let requests finish for up to `drain_s`, then fail what is left and end the thread. `reason` is what clients
        are told whose requests are left or come later; without one, an `EngineDeadError`."""
        self._reason = reason
        deadline = time.monotonic() + drain_s
        while self.num_unfinished and self.alive and not self._parked and time.monotonic() < deadline:
            time.sleep(0.02)
        self._inbox.put(_Stop(self._threads))
        if self._thread.ident is not None:
            self._thread.join()
        if self._parked:
            self._parked = False
            self._die()

    # -- handing requests over --------------------------------------------------------------------------------------

    def park(self) -> None:
        """Let the steps in flight come back and end the thread. Nothing is lost: see the class."""
        self._inbox.put(_Stop(self._threads, parked=True))
        self._thread.join()

    def resume(self) -> None:
        """Go on after `park`, with the blocks that sequences have."""
        self._parked = False
        self._threads += 1
        self._thread = self._new_thread()
        self._thread.start()

    def longest_request(self) -> int:
        """Tokens that the longest unfinished request may come to, prompt and answer. While parked."""
        return max((sequence.request.most_tokens for sequence in self.scheduler.live_sequences()), default=0)

    def adopt(self, other: ContinuousBatcher) -> None:
        """Take over all that another batcher, which is parked, has and was sent. What had KV there is computed again
        here. In the engine thread, or before that has started."""
        arrived = other.intake.close(EngineMovedError("The request has moved to another engine."))
        other.scheduler.start_over()
        writers = other._publisher.release()
        self.intake.adopt(writer.request for writer in writers)
        for writer in writers:
            writer.handle.moved(self.abort)
            self._publisher.take(writer)
            self.scheduler.adopt(writer.request)
        for message in [*other._calls, *arrived]:
            self._pass_on(message)
        other._parked = False

    def _pass_on(self, message: Any) -> None:
        """A message that another batcher was sent."""
        if isinstance(message, tuple):
            request, handle = message
            room = self.scheduler.limits.max_model_len
            if not request.fit_into(room):  # it came after the others had been looked at
                needed = request.most_tokens
                said = (
                    f"This model's maximum context length is {room} tokens where it has moved to, and the request may "
                    f"come to {needed}."
                )
                handle.put(ContextLengthError(said, param="max_tokens"))
                return
            self.intake.adopt([request])
            handle.moved(self.abort)
            self._inbox.put(message)
        elif isinstance(message, Abort):
            self._inbox.put(message)
        elif isinstance(message, Call):
            message.refuse(EngineMovedError("The model is being moved to other devices; try again."))

    # -- the engine thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._parked and self._read_inbox():
                self._fill()
        except BaseException as error:  # the thread's last words: whatever it was, waiting clients must hear of it
            self.error = error
            logger.error("engine stopped", error=repr(error), exc_info=True)
        finally:
            if not self._parked:
                self._die()

    def _fill(self) -> None:
        """Put as many steps in flight as are wanted now. One alone runs here, without a change of threads."""
        if not self._keep_house():
            return
        while not (self._calls or self._parked):
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
            self._runner.submit(output, lambda output, result: self._inbox.put(_Done(output, result)))

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
            self._publisher.fail(self.scheduler.fail(output, moved=False), result)
            return False
        self.scheduler.kv.step_done(output.step)
        return True

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
                if message.thread != self._threads:
                    continue  # was meant for one that had parked by itself
                self._drain()
                self._parked = message.parked
                return False
            self._take(message)
            if self._parked:
                self._drain()
                return False
            if isinstance(message, Call) and not self.scheduler.kv.is_idle:
                return True  # callers that keep calling must not keep memory from going back
            block = not (self.scheduler.has_work or self._in_flight or self.scheduler.kv.wants_stop)

    def _take(self, message: _Done | Abort | Call | _Loaded | tuple[Request, RequestHandle]) -> None:
        if isinstance(message, _Done):
            self._in_flight -= 1
            self._complete(message.output, message.result)
        elif isinstance(message, Abort):
            if self._publisher.abort(message.request_id):
                self._stats.refresh_counts()
        elif isinstance(message, Call):
            self._calls.append(message)
        elif isinstance(message, _Loaded):
            self.scheduler.waiting.loaded(message.seq_id)
        elif self._publisher.open(*message):
            self.scheduler.add(message[0])
        while self._calls and not self._in_flight:
            self._calls.pop(0).run()

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

    def _execute(self, output: SchedulerOutput) -> StepOutput | Exception:
        try:
            return self._runner.execute(output)
        except Exception as error:  # noqa: BLE001  any failure of a forward pass is this batch's alone
            return error

    def _complete(self, output: SchedulerOutput, result: StepOutput | Exception) -> None:
        """Publish what a step produced; if it failed, its sequences are computed again and the engine goes on."""
        answers: Answers = {}
        if isinstance(result, Exception):
            self._failed(output, result)
        else:
            self.breaker.record_success()
            answers = self._publisher.prepare(self.scheduler.update_from_output(output, result))
        # Whoever has an answer and then asks how the engine is finds the step in which the answer came.
        self._stats.step_done(output, None if isinstance(result, Exception) else result, self.breaker.last_error)
        self._publisher.send(answers)

    def _failed(self, output: SchedulerOutput, error: Exception) -> None:
        """Sequences of a failed step are tried again; those that have failed too often are told why."""
        lost = isinstance(error, DeviceLostError)  # where the code was then says nothing
        logger.error(
            "step failed", step=output.step, sequences=output.record.num_sequences, reason=str(error) or repr(error),
            exc_info=None if lost else error,
        )  # fmt: skip
        no_memory = isinstance(error, OutOfDeviceMemoryError)
        if isinstance(error, DeviceLostError) and not self._parked and self.on_lost(error):
            self._parked = True
        if not no_memory:
            self.breaker.record_failure(repr(error))
        moved = not isinstance(error, (DeviceLostError, PageMoveError))
        ended = self.scheduler.fail(output, moved=moved, memory=no_memory, blame=not self._parked)
        self._publisher.fail(ended, error)

    def _die(self) -> None:
        """Refuse what comes and fail what waits."""
        if self.error is None and self._reason is not None:
            error = copy.copy(self._reason)  # whoever raises it adds to its traceback
        else:
            reason = f": {self.error}" if self.error is not None else ""
            error = EngineDeadError(f"The engine has stopped{reason}.")
        waiting = self.intake.close(error)
        self._publisher.fail_everything(error)
        for message in [*self._calls, *waiting]:
            if isinstance(message, Call):
                message.refuse(error)
            elif isinstance(message, tuple):
                message[1].put(error)
                self.intake.release(message[0].request_id)
