"""When the engine's thread runs steps, moves pages, waits for memory and runs calls, and what it makes of failures."""

from __future__ import annotations

import queue
import threading
from typing import Any

import pytest
from batcher_cases import SOON_S, Below, Bench, Clock, Landlord, Open, sequences_of, tokens_of
from test_decisions import OTHER, make_request, make_scheduler

from core.batching.scheduler import MAX_MEMORY_FAILURES, Scheduler
from core.batching.step import SchedulerLimits
from core.errors import (
    CircuitOpenError,
    DeviceLostError,
    EngineDeadError,
    OutOfDeviceMemoryError,
    PageMoveError,
    StepFailedError,
    UnavailableError,
)
from core.kv_cache.manager import KVCacheManager


def make_kv(**companions: Any) -> Scheduler:
    return Scheduler(KVCacheManager(32, 4, **companions), SchedulerLimits(8, 64, 64, 256))


# -- memory that was taken back ----------------------------------------------------------------------------------------


def test_who_waits_for_memory_that_was_taken_back_is_told_so_after_a_while_and_not_before(
    open_bench: Open, clock: Clock
) -> None:
    bench = open_bench(backed=1)
    with pytest.raises(UnavailableError, match=r"has 8 tokens, .* taken back the devices hold 4\.$") as caught:
        bench.submit("a").get(SOON_S)
    assert (clock.looks, caught.value.retry_after_s) == (4, 30.0)
    assert not bench.stages.steps and bench.batcher.num_unfinished == 0


def test_those_who_wait_together_are_told_one_after_the_other(open_bench: Open, clock: Clock) -> None:
    bench = open_bench(backed=1)
    first, second = bench.submit("a"), bench.submit("b", 9)
    with pytest.raises(UnavailableError, match="has 8 tokens"):
        first.get(SOON_S)
    with pytest.raises(UnavailableError, match="has 9 tokens"):
        second.get(SOON_S)
    assert clock.looks == 4 + 4


def test_who_gets_the_memory_in_time_is_served_and_the_next_wait_starts_anew(open_bench: Open, clock: Clock) -> None:
    bench = open_bench(backed=1)
    clock.at[3] = lambda: bench.batcher.call(lambda: bench.have_memory_for(32))
    assert tokens_of(bench.submit("a", max_tokens=2).result(SOON_S)) == [OTHER, OTHER]
    assert clock.looks == 3
    bench.call(lambda: bench.have_memory_for(1))
    with pytest.raises(UnavailableError):
        bench.submit("b").get(SOON_S)
    assert clock.looks == 3 + 4


def test_the_wait_starts_anew_when_whoever_waited_has_gone(open_bench: Open, clock: Clock) -> None:
    bench = open_bench(backed=1)

    def leave() -> None:
        bench.policy.idle.clear()
        bench.batcher.abort("a")

    clock.at[3] = leave
    gone = bench.submit("a").result(SOON_S)
    assert gone.completions[0].finish_reason == "abort"
    assert bench.policy.idle.wait(SOON_S)
    with pytest.raises(UnavailableError):
        bench.submit("b").get(SOON_S)
    assert clock.looks == 3 + 4


def test_who_is_fetched_from_below_again_and_again_has_waited_all_the_time(open_bench: Open, clock: Clock) -> None:
    bench = open_bench(make_kv(tiers=Below), backed=1)
    with pytest.raises(UnavailableError):
        bench.submit("a").get(SOON_S)
    assert isinstance(bench.kv.tiers, Below)
    assert (clock.looks, bench.kv.tiers.asked) == (4, 4)


def test_while_all_wait_for_memory_pages_move_in_steps_of_their_own(open_bench: Open, clock: Clock) -> None:
    bench = open_bench(backed=1)
    clock.at[1] = clock.at[2] = lambda: bench.kv.pages.copy(0, 1)
    with pytest.raises(UnavailableError):
        bench.submit("a").get(SOON_S)
    assert [(output.step, sequences_of(output)) for output in bench.stages.steps] == [(1, 0), (2, 0)]
    assert not bench.kv.in_flight


def test_without_memory_that_could_come_back_nobody_waits_for_it(open_bench: Open) -> None:
    bench = open_bench(make_scheduler(blocks=1))
    with pytest.raises(EngineDeadError, match="stopped: sequences wait, but none of them can be scheduled"):
        bench.submit("a").get(SOON_S)
    bench.batcher.stop()
    assert isinstance(bench.batcher.error, RuntimeError) and not bench.batcher.alive


# -- pages that move ---------------------------------------------------------------------------------------------------


def test_steps_that_only_move_pages_have_numbers_of_their_own(open_bench: Open) -> None:
    bench = open_bench()
    for name in "ab":
        bench.submit(name, max_tokens=2).result(SOON_S)
        bench.call(lambda: bench.kv.pages.copy(0, 1))
        bench.call(lambda: None)
    bench.submit("c", max_tokens=1).result(SOON_S)
    told = [bench.stages.executed.get(timeout=SOON_S) for _ in range(7)]
    assert [output.step for output in told] == [1, 2, 3, 4, 5, 6, 7]
    assert [sequences_of(output) for output in told] == [1, 1, 0, 1, 1, 0, 1]
    assert [len(output.parts) for output in told] == [0, 0, 1, 0, 0, 1, 0]


def test_an_engine_without_work_looks_after_its_companions_until_they_are_idle(open_bench: Open, clock: Clock) -> None:
    bench = open_bench(make_kv(lender=Landlord))
    lender = bench.kv.lender
    assert isinstance(lender, Landlord)

    def begin() -> None:
        lender.busy = True

    bench.call(begin)
    lender.forget_ticks()
    for _ in range(5):
        lender.ticks.get(timeout=SOON_S)
    lender.busy = False
    assert not bench.stages.steps


def test_callers_that_keep_calling_do_not_keep_companions_from_their_work(open_bench: Open) -> None:
    bench = open_bench(make_kv(lender=Landlord))
    lender, came_to_it = bench.kv.lender, threading.Event()
    assert isinstance(lender, Landlord)

    def again(ticks: int) -> None:
        lender.busy = True
        if lender.ticks.qsize() > ticks:
            came_to_it.set()
        else:
            bench.batcher.call(lambda: again(ticks))

    bench.batcher.call(lambda: again(lender.ticks.qsize()))
    assert came_to_it.wait(SOON_S)


def test_while_pages_have_to_move_first_nothing_is_computed(open_bench: Open) -> None:
    bench = open_bench(make_kv(lender=Landlord), cohorts=2)
    lender = bench.kv.lender
    assert isinstance(lender, Landlord)
    first = bench.submit("a", max_tokens=2)
    bench.stages.submitted.get(timeout=SOON_S)
    lender.forget_ticks()
    lender.urgent = True
    second = bench.submit("b", max_tokens=2, arrival=1)
    assert lender.ticks.get(timeout=SOON_S), "a step is in flight"
    assert bench.stages.num_flying == 1, "there would be room for another one"
    bench.stages.land()
    bench.stages.let_go()
    assert tokens_of(first.result(SOON_S)) == tokens_of(second.result(SOON_S)) == [OTHER, OTHER]
    assert [sequences_of(output) for output in bench.stages.steps][:2] == [1, 0]


def test_pages_that_could_not_be_moved_make_what_runs_be_computed_again(open_bench: Open) -> None:
    bench = open_bench(make_kv(lender=Landlord), cohorts=2)
    lender = bench.kv.lender
    assert isinstance(lender, Landlord)
    handle = bench.submit("a", max_tokens=3)
    bench.stages.failures = [None, PageMoveError("a page is stuck")]
    bench.stages.submitted.get(timeout=SOON_S)
    lender.urgent = True
    bench.stages.land()
    bench.stages.let_go()
    assert tokens_of(handle.result(SOON_S)) == [OTHER] * 3
    assert [output.num_tokens for output in bench.stages.steps] == [8, 0, 9, 1], "all of it, since nothing is certain"


# -- calls -------------------------------------------------------------------------------------------------------------


def test_a_call_runs_while_no_step_is_in_flight_and_none_is_begun_before(open_bench: Open) -> None:
    bench = open_bench(make_kv(lender=Landlord), cohorts=2)
    lender = bench.kv.lender
    assert isinstance(lender, Landlord)
    bench.submit("a")
    bench.stages.submitted.get(timeout=SOON_S)
    lender.forget_ticks()
    called = bench.batcher.call(lambda: (bench.stages.num_flying, len(bench.stages.steps)))
    lender.ticks.get(timeout=SOON_S)  # it has arrived
    bench.submit("b")
    lender.ticks.get(timeout=SOON_S)
    bench.stages.land()
    assert called.result(SOON_S) == (0, 1)
    for _ in range(2):
        bench.stages.submitted.get(timeout=SOON_S)
    assert bench.stages.num_flying == 2


def test_what_a_call_raises_is_its_callers_alone(open_bench: Open) -> None:
    bench = open_bench()
    with pytest.raises(ZeroDivisionError):
        bench.call(lambda: 1 // 0)
    assert tokens_of(bench.submit("a", max_tokens=1).result(SOON_S)) == [OTHER]


class Witness(queue.SimpleQueue[Any]):
    """A sink that notes what the engine says of itself when a message comes."""

    def __init__(self, bench: Bench, notes: list[tuple[int, int, int]]) -> None:
        self.bench, self.notes = bench, notes

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        stats = self.bench.batcher.stats
        self.notes.append((stats.total_tokens, stats.running, self.bench.batcher.num_unfinished))
        super().put(item)


def test_whoever_has_an_answer_finds_it_in_what_the_engine_says_of_itself(open_bench: Open) -> None:
    bench = open_bench()
    notes: list[tuple[int, int, int]] = []
    sink = Witness(bench, notes)
    bench.batcher.submit([make_request("a", 8, max_tokens=2)], sink=sink)
    for _ in range(2):
        sink.get(timeout=SOON_S)
    assert notes == [(1, 1, 1), (2, 0, 0)]


# -- steps that fail ---------------------------------------------------------------------------------------------------


def test_a_request_is_tried_again_until_steps_have_failed_too_often(open_bench: Open) -> None:
    bench = open_bench()
    bench.stages.failures = [ValueError("no"), ValueError("no"), None, None]
    assert tokens_of(bench.submit("a", max_tokens=2).result(SOON_S)) == [OTHER, OTHER]
    assert bench.batcher.breaker.consecutive_failures == 0
    bench.stages.failures = [ValueError("out of luck")] * 3
    with pytest.raises(StepFailedError, match="The forward pass failed: out of luck"):
        bench.submit("b").get(SOON_S)
    with pytest.raises(CircuitOpenError, match="out of luck"):
        bench.submit("c")
    bench.call(lambda: None)
    assert (bench.batcher.stats.failed_steps, bench.batcher.stats.total_tokens) == (5, 2)


def test_memory_that_runs_out_does_not_open_the_circuit(open_bench: Open) -> None:
    bench = open_bench()
    bench.stages.failures = [OutOfDeviceMemoryError("full") for _ in range(MAX_MEMORY_FAILURES)]
    with pytest.raises(OutOfDeviceMemoryError, match="full"):
        bench.submit("a", 32).get(SOON_S)
    assert [output.num_tokens for output in bench.stages.steps][:6] == [32, 16, 8, 4, 2, 1]
    assert (bench.batcher.breaker.state, bench.batcher.breaker.consecutive_failures) == ("closed", 0)


@pytest.mark.parametrize(
    ("error", "again"),
    [(ValueError("no"), 1), (PageMoveError("stuck"), 9), (DeviceLostError("gone", device="gpu1"), 9)],
)
def test_what_was_computed_before_is_relied_on_unless_pages_may_be_wrong(
    open_bench: Open, error: Exception, again: int
) -> None:
    bench = open_bench()
    bench.stages.failures = [None, error]
    assert tokens_of(bench.submit("a", max_tokens=2).result(SOON_S)) == [OTHER, OTHER]
    assert [output.num_tokens for output in bench.stages.steps] == [8, 1, again]
