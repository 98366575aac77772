"""Engines that stand still, go on, hand their requests over to others, and end."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from batcher_cases import SOON_S, Bench, Open, tokens_of
from test_decisions import OTHER, make_scheduler

from core.batching.output import RequestHandle
from core.errors import ContextLengthError, DeviceLostError, EngineDeadError, EngineMovedError, UnavailableError
from core.request import SamplingParams

# -- standing still and handing over -----------------------------------------------------------------------------------


def lose_a_device(bench: Bench, name: str = "a", **fields: Any) -> RequestHandle:
    """A request has one of its tokens when a device is lost, and the batcher has parked itself."""
    bench.batcher.on_lost = lambda error: error.device == "gpu1"
    bench.stages.failures = [None, DeviceLostError("gone", device="gpu1")]
    handle = bench.submit(name, **fields)
    for _ in range(2):
        bench.stages.executed.get(timeout=SOON_S)
    bench.batcher.park()
    return handle


def test_one_that_stands_still_is_alive_and_goes_on_where_it_was(open_bench: Open) -> None:
    bench = open_bench()
    first = lose_a_device(bench, max_tokens=10)
    assert bench.batcher.alive and not first.finished
    assert bench.batcher.longest_request() == 8 + 10
    second = bench.submit("b", max_tokens=3)
    assert (bench.batcher.num_unfinished, len(bench.stages.steps)) == (2, 2)
    bench.batcher.resume()
    assert tokens_of(first.result(SOON_S)) == [OTHER] * 10
    assert tokens_of(second.result(SOON_S)) == [OTHER] * 3


def test_a_device_that_nobody_sees_to_fails_its_steps_like_any_other_error(open_bench: Open) -> None:
    bench = open_bench()
    bench.stages.failures = [DeviceLostError("gpu2 is gone", device="gpu2")] * 3
    with pytest.raises(DeviceLostError, match="gpu2 is gone"):
        bench.submit("a").get(SOON_S)
    assert bench.batcher.alive and bench.batcher.breaker.state == "open"


def test_parking_lets_the_steps_in_flight_come_back(open_bench: Open) -> None:
    bench = open_bench(cohorts=2)
    handles = [bench.submit(name, max_tokens=30) for name in "ab"]
    bench.stages.submitted.get(timeout=SOON_S)
    parking = threading.Thread(target=bench.batcher.park)
    parking.start()
    bench.stages.let_go()
    parking.join(SOON_S)
    assert not parking.is_alive()
    assert bench.stages.num_flying == 0 and not bench.kv.in_flight
    bench.batcher.resume()
    assert [tokens_of(handle.result(SOON_S)) for handle in handles] == [[OTHER] * 30] * 2
    assert bench.scheduler.num_preemptions == 0


def test_what_comes_while_the_last_steps_come_back_is_not_lost(open_bench: Open) -> None:
    bench, lost = open_bench(cohorts=2), threading.Event()

    def on_lost(error: DeviceLostError) -> bool:
        lost.set()
        return True

    bench.batcher.on_lost = on_lost
    bench.stages.failures = [DeviceLostError("gone", device="gpu1")]
    handles = []
    for name in "ab":
        handles.append(bench.submit(name, max_tokens=3))
        bench.stages.submitted.get(timeout=SOON_S)
    bench.stages.land()
    assert lost.wait(SOON_S)
    handles.append(bench.submit("c", max_tokens=3))
    bench.stages.let_go()
    bench.batcher.park()
    assert not bench.kv.in_flight and bench.batcher.num_unfinished == 3
    bench.batcher.resume()
    assert [tokens_of(handle.result(SOON_S)) for handle in handles] == [[OTHER] * 3] * 3


def test_who_hands_over_what_runs_keeps_no_blocks(open_bench: Open) -> None:
    large = [make_scheduler(blocks=3000, room=12000) for _ in range(2)]
    old, new = map(open_bench, large)
    handle = old.submit("a", max_tokens=10_000)
    old.stages.executed.get(timeout=SOON_S)
    old.batcher.park()
    assert old.kv.pool.num_referenced > 0 and not handle.finished
    new.call(lambda: new.batcher.adopt(old.batcher))
    assert old.kv.pool.num_referenced == 0
    handle.abort()
    assert handle.result(SOON_S).completions[0].finish_reason == "abort"
    new.call(new.scheduler.check_invariants)


def test_another_batcher_takes_over_what_ran_and_what_came_since(open_bench: Open) -> None:
    old, new = open_bench(), open_bench()
    running = lose_a_device(old, max_tokens=4)
    came, unwanted = old.submit("b", max_tokens=2), old.submit("c", max_tokens=2)
    unwanted.abort()
    called = old.batcher.call(lambda: None)
    new.call(lambda: new.batcher.adopt(old.batcher))
    assert tokens_of(running.result(SOON_S)) == [OTHER] * 4
    assert tokens_of(came.result(SOON_S)) == [OTHER] * 2
    assert unwanted.result(SOON_S).completions[0].finish_reason == "abort"
    first = [item.end - item.start for item in new.stages.steps[0].sequences]
    assert sorted(first) == [8, 8 + 1], "computed again, with the token it had"
    with pytest.raises(EngineMovedError, match="try again"):
        called.result(SOON_S)
    old.batcher.stop()
    with pytest.raises(EngineMovedError, match="has moved to another engine"):
        old.submit("d")
    assert not old.batcher.alive and old.kv.pool.num_referenced == 0
    assert len(old.stages.steps) == 2 and new.batcher.num_unfinished == 0


def test_what_came_since_and_is_too_long_for_the_other_batcher_is_told_so(open_bench: Open) -> None:
    old, new = open_bench(), open_bench(make_scheduler(room=20))
    running = lose_a_device(old, max_tokens=4)
    long = old.submit("b", 8, params=SamplingParams(max_tokens=13), max_tokens=13)
    fits = old.submit("c", 8, params=SamplingParams(max_tokens=12, ignore_eos=True), max_tokens=12)
    new.call(lambda: new.batcher.adopt(old.batcher))
    with pytest.raises(ContextLengthError, match=r"is 20 tokens where it has moved to, .* come to 21") as caught:
        long.get(SOON_S)
    assert caught.value.param == "max_tokens"
    assert len(tokens_of(fits.result(SOON_S))) == 12 and len(tokens_of(running.result(SOON_S))) == 4


def test_an_abort_reaches_the_batcher_that_has_taken_over(open_bench: Open) -> None:
    old, new = open_bench(), open_bench(backed=1)
    running = lose_a_device(old)
    came = old.submit("b")
    new.call(lambda: new.batcher.adopt(old.batcher))
    for handle in (running, came):
        handle.abort()
    reasons = [handle.result(SOON_S).completions[0].finish_reason for handle in (running, came)]
    assert reasons == ["abort", "abort"] and not new.stages.steps


# -- the end -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parked", [False, True])
@pytest.mark.parametrize("reason", [None, UnavailableError("The model was unloaded.", retry_after_s=7.0, code="gone")])
def test_clients_are_told_why_it_ended(open_bench: Open, parked: bool, reason: UnavailableError | None) -> None:
    bench = open_bench(backed=None if parked else 1)
    handle = lose_a_device(bench, n=2) if parked else bench.submit("a", n=2)
    came = bench.submit("b")
    bench.batcher.stop(reason=reason)
    told = reason or EngineDeadError("The engine has stopped.")
    if parked:
        assert handle.get(SOON_S) is not None, "its first token"
    later = (lambda: bench.submit("c"), lambda: bench.call(list))
    for ask in (lambda: handle.get(SOON_S), lambda: came.get(SOON_S), *later):
        with pytest.raises(UnavailableError) as caught:
            ask()
        assert (type(caught.value), caught.value.message) == (type(told), told.message)
        assert (caught.value.retry_after_s, caught.value.to_openai()) == (told.retry_after_s, told.to_openai())
    assert not bench.batcher.alive and bench.batcher.num_unfinished == 0
    assert bench.kv.pool.num_referenced == 0


def test_one_that_is_given_time_lets_requests_finish_first(open_bench: Open) -> None:
    bench = open_bench()
    handle = bench.submit("a", max_tokens=50)
    bench.batcher.stop(drain_s=SOON_S)
    assert tokens_of(handle.result(0)) == [OTHER] * 50


def test_calls_that_wait_when_it_ends_are_refused(open_bench: Open) -> None:
    bench = open_bench()
    lose_a_device(bench)
    called = bench.batcher.call(lambda: "never")
    bench.batcher.stop()
    with pytest.raises(EngineDeadError):
        called.result(SOON_S)
