"""What an attempt to start a waiting sequence costs, and what a token of a prompt is taken to cost."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from core.batching.scheduler import Scheduler
from core.batching.sequence import Request, Sequence
from core.batching.step import PrefillMeter, SchedulerLimits
from core.execution.records import SampledToken, SchedulerOutput, StepOutput, StepRecord, ints, longs
from core.kv_cache import block_table
from core.kv_cache.manager import KVCacheManager
from core.request import SamplingParams


def request(name: str, prompt: list[int], arrival: int) -> Request:
    made = Request(name, prompt, SamplingParams(ignore_eos=True), 1000, arrival=arrival)
    made.sequences = [Sequence(made, 0, 0, list(prompt))]
    return made


def test_a_prompt_is_hashed_once_however_often_it_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[bytes] = []

    class Counting:
        @staticmethod
        def blake2b(data: bytes, **options: Any) -> Any:
            hashed.append(data)
            return hashlib.blake2b(data, **options)

    monkeypatch.setattr(block_table, "hashlib", Counting)
    scheduler = Scheduler(KVCacheManager(12, 4), SchedulerLimits(8, 64, 64, 256))
    scheduler.add(request("runs", list(range(30)), 0))
    output = scheduler.schedule()
    assert output is not None
    scheduler.add(request("waits", list(range(100, 140)), 1))
    tried = []
    for step in range(1, 8):
        scheduler.update_from_output(output, StepOutput(step, {output.sequences[0].seq_id: SampledToken(5)}))
        before = len(hashed)
        output = scheduler.schedule()
        assert output is not None and len(output.sequences) == 1, "there is no room for the other"
        tried.append(len(hashed) - before)
    assert sum(tried) <= 40 // 4 + 30 // 4 + 3


def test_what_a_step_waited_for_others_is_not_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 10.0, 14.0])
    monkeypatch.setattr("core.batching.step.time.perf_counter", lambda: next(clock))

    def step(number: int) -> SchedulerOutput:
        flags = np.zeros(1, dtype=np.uint8)
        return SchedulerOutput(StepRecord(number, longs([1]), ints([0]), ints([20]), ints([0]), flags))

    meter = PrefillMeter()
    meter.begun(1)  # at 0
    meter.begun(2)  # at 1, behind the first
    assert meter.ended(step(1)) == pytest.approx(10 / 20)
    assert meter.ended(step(2)) == pytest.approx(0.5 + 0.3 * (4 / 20 - 0.5)), "4 s of the 13 that it was on its way"


def test_pieces_of_a_prompt_that_fail_together_count_once() -> None:
    """A fault that lasts for as long as all of them are on their way is one try, not three."""
    scheduler = Scheduler(KVCacheManager(64, 4), SchedulerLimits(8, 8, 8, 256))
    scheduler.add(request("long", list(range(40)), 0))
    pieces = [scheduler.schedule(3, 8) for _ in range(3)]
    for piece in pieces:
        assert piece is not None
        assert scheduler.fail(piece) == [], "it is tried again"
    (sequence,) = scheduler.live_sequences()
    assert (sequence.num_failures, sequence.in_flight, sequence.num_told_tokens) == (1, 0, 0)
    scheduler.check_invariants()


@pytest.mark.parametrize(("owner", "cached"), [("me", 16), ("you", 0)])
def test_what_one_owner_has_said_no_other_finds(owner: str, cached: int) -> None:
    scheduler = Scheduler(KVCacheManager(64, 4), SchedulerLimits(8, 64, 64, 256))
    first, second = request("first", list(range(20)), 0), request("second", list(range(20)), 1)
    first.owner, second.owner = "me", owner
    scheduler.add(first)
    output = scheduler.schedule()
    assert output is not None
    scheduler.update_from_output(output, StepOutput(1, {output.sequences[0].seq_id: SampledToken(5)}))
    scheduler.add(second)
    assert scheduler.schedule() is not None
    assert second.num_cached_tokens == cached
