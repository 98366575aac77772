"""A batcher with the real scheduler, on stages, a clock and companions that do what a test says."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

from test_decisions import OTHER, Words, make_request

from core.batching.batcher import ContinuousBatcher
from core.batching.cohorts import CohortChoice, CohortPolicy
from core.batching.intake import CircuitBreaker
from core.batching.output import RequestHandle
from core.batching.scheduler import Scheduler
from core.execution.records import SAMPLE, SampledToken, SchedulerOutput, StepDone, StepOutput
from core.kv_cache.companions import Lender, Tiers
from core.kv_cache.manager import KVCacheManager
from core.request import GenerationResult

SOON_S = 10.0
"""Nothing here takes so long, unless it never comes."""
AFTER_S = 10.0
"""What passes between two looks at the clock, of which the fourth is 30 s after the first."""


class Stages:
    """A runner. `failures` are raised, the first by the first step. While it is `holding`, steps stay in flight until
    they are let `land`."""

    def __init__(self) -> None:
        self.failures: list[Exception | None] = []
        self.steps: list[SchedulerOutput] = []
        self.executed: queue.SimpleQueue[SchedulerOutput] = queue.SimpleQueue()
        self.submitted: queue.SimpleQueue[SchedulerOutput] = queue.SimpleQueue()
        self._landed: list[int] = []
        self._begun: list[int] = []
        self._holding = True
        self._flying: queue.SimpleQueue[tuple[SchedulerOutput, StepDone]] = queue.SimpleQueue()
        self._lock = threading.Lock()

    @property
    def num_flying(self) -> int:
        return len(self._begun) - len(self._landed)

    def execute(self, output: SchedulerOutput) -> StepOutput:
        self.steps.append(output)
        self.executed.put(output)
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None:
            raise failure
        record = output.record
        sampling = record.seq_ids[(record.flags & SAMPLE) != 0].tolist()
        return StepOutput(output.step, {seq_id: SampledToken(OTHER) for seq_id in sampling})

    def submit(self, output: SchedulerOutput, done: StepDone) -> None:
        with self._lock:
            self._begun.append(output.step)
            self._flying.put((output, done))
            self.submitted.put(output)
            if not self._holding:
                self.land()

    def land(self) -> None:
        """The step that was submitted first comes back."""
        output, done = self._flying.get(timeout=SOON_S)
        result: StepOutput | Exception
        try:
            result = self.execute(output)
        except Exception as error:  # noqa: BLE001  as runners do
            result = error
        self._landed.append(output.step)
        done(output, result)

    def let_go(self) -> None:
        """From now on steps come back at once."""
        with self._lock:
            self._holding = False
            while not self._flying.empty():
                self.land()


class Turns(CohortPolicy):
    """So many cohorts. `idle` is set when there was nothing to schedule."""

    def __init__(self, cohorts: int) -> None:
        self.cohorts, self.idle = cohorts, threading.Event()

    def choose(self, decoding: int, context: int, prompt_tokens: int) -> CohortChoice:
        if not (context or prompt_tokens):
            self.idle.set()
        return CohortChoice(self.cohorts, 64)


class Clock:
    """Moves on whenever the batcher looks at it. `at` has what happens at the first look, the second and so on."""

    def __init__(self) -> None:
        self.looks = 0
        self.at: dict[int, Callable[[], object]] = {}

    def __call__(self) -> float:
        self.looks += 1
        self.at.get(self.looks, lambda: None)()
        return 1000.0 + AFTER_S * self.looks


class Landlord(Lender):
    """Lends nothing, but may want pages to move: in a step of their own if it is `urgent`."""

    def __init__(self, kv: KVCacheManager) -> None:
        self.kv = kv
        self.busy = self.urgent = False
        self._asked, self._carried_by = False, 0
        self.ticks: queue.SimpleQueue[bool] = queue.SimpleQueue()

    @property
    def is_idle(self) -> bool:
        return not self.busy

    @property
    def wants_stop(self) -> bool:
        return self.urgent

    def tick(self, waiting_blocks: int) -> None:
        if self.urgent and not self.kv.pages.has_ops:
            self.kv.pages.copy(0, 1)
            self._asked = True
        self.ticks.put(self.kv.in_flight)

    def step_taken(self, step: int) -> None:
        if self._asked:
            self._asked, self._carried_by = False, step

    def step_done(self, step: int, moved: bool) -> None:
        if step == self._carried_by:
            self.urgent = False

    def borrow(self, blocks: int) -> None: ...

    def forget_ticks(self) -> None:
        while not self.ticks.empty():
            self.ticks.get()


class Below(Tiers):
    """Says of everything that it is on its way up, and then has nothing."""

    def __init__(self, kv: KVCacheManager) -> None:
        self.asked = 0

    def prefetch(self, seq_id: int, known: int, hashes: Sequence[bytes], on_done: Callable[[], Any]) -> bool:
        self.asked += 1
        on_done()
        return True

    def take(self, seq_id: int, known: int) -> None: ...

    def save(self, block: int, digest: bytes, parent: bytes | None) -> None: ...

    def reused(self, blocks: Sequence[int], digests: Sequence[bytes]) -> None: ...

    def loaded(self, loading: Any, digests: Sequence[bytes]) -> None: ...

    def cancel(self, seq_id: int) -> None: ...


class Bench:
    """A batcher, and what it works with. `backed`: for how many blocks there is memory."""

    def __init__(self, scheduler: Scheduler, cohorts: int) -> None:
        self.scheduler, self.kv = scheduler, scheduler.kv
        self.backed = self.kv.pool.num_blocks
        self.stages, self.policy = Stages(), Turns(cohorts)
        self.batcher = ContinuousBatcher(
            self.stages, scheduler, Words(), max_queue=8, max_queued_tokens=1000, breaker=CircuitBreaker(3, 60.0),
            policy=self.policy,
        )  # fmt: skip

    def submit(self, name: str, prompt: list[int] | int = 8, **fields: Any) -> RequestHandle:
        return self.batcher.submit([make_request(name, prompt, **fields)])[0]

    def have_memory_for(self, blocks: int) -> None:
        """In the engine thread."""
        self.backed = blocks
        self.kv.refresh_limit()

    def call(self, function: Callable[[], Any]) -> Any:
        return self.batcher.call(function).result(SOON_S)

    def close(self) -> None:
        self.stages.let_go()
        self.batcher.stop()


Open = Callable[..., Bench]
"""The fixture `open_bench`."""


def tokens_of(result: GenerationResult) -> list[int]:
    return result.completions[0].token_ids


def sequences_of(output: SchedulerOutput) -> int:
    return output.record.num_sequences
