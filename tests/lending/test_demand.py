"""Borrowing ahead of need, and giving back what is not needed, on made-up traces of load."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.lending import DemandWatch

EXTENT = 32
OWN = 100
STEP_S = 0.05


@dataclass
class Trace:
    """A borrower on an unlimited pool: grants take `lead_s`, blocks that are not needed go back."""

    watch: DemandWatch
    lead_s: float = 0.2
    borrowed: int = 0
    starved_steps: int = 0
    borrows: list[tuple[float, int]] = field(default_factory=list)
    returns: list[tuple[float, int]] = field(default_factory=list)

    def run(self, load: Iterable[float]) -> Trace:
        for step, blocks in enumerate(load):
            now_s, used = step * STEP_S, round(blocks)
            arrived = self.borrowed - sum(count for at_s, count in self.borrows if at_s > now_s - self.lead_s)
            self.starved_steps += used > OWN + arrived
            self.watch.observe(now_s, used, OWN + self.borrowed)
            if wanted := self.watch.blocks_to_borrow():
                self.borrowed += wanted
                self.borrows.append((now_s, wanted))
                self.watch.granted(self.lead_s)
            elif unused := self.watch.blocks_to_return(self.borrowed):
                self.borrowed -= unused
                self.returns.append((now_s, unused))
            assert self.borrowed >= 0
        return self


def seconds(duration_s: float, load: Callable[[float], float]) -> list[float]:
    return [load(step * STEP_S) for step in range(round(duration_s / STEP_S))]


def watch(**changes: float) -> DemandWatch:
    return DemandWatch(EXTENT, **{"lead_s": 0.2, "hold_s": 5.0, **changes})  # type: ignore[arg-type]


def test_a_load_that_fits_borrows_nothing() -> None:
    trace = Trace(watch()).run(seconds(60, lambda t: OWN - EXTENT))
    assert (trace.borrows, trace.returns) == ([], [])


@pytest.mark.parametrize("blocks_s", [2.0, 20.0, 200.0])
def test_a_steady_climb_never_runs_dry(blocks_s: float) -> None:
    trace = Trace(watch()).run(seconds(20, lambda t: blocks_s * t))
    assert trace.starved_steps == 0
    assert trace.returns == []
    assert all(count % EXTENT == 0 for _, count in trace.borrows)
    ahead = OWN + trace.borrowed - blocks_s * 20
    assert EXTENT <= ahead <= blocks_s * trace.watch.horizon_s + 2 * EXTENT, "and it does not run far ahead either"


def test_without_the_rate_a_climb_would_run_dry() -> None:
    """The speculative part is what keeps a fast climb fed: an observer that sees no growth is late."""
    blind = watch(rate_window_s=1e9)  # the rate stays close to 0
    assert Trace(blind).run(seconds(20, lambda t: 200 * t)).starved_steps > 0
    assert Trace(watch()).run(seconds(20, lambda t: 200 * t)).starved_steps == 0


def test_a_climb_that_speeds_up_is_followed() -> None:
    assert Trace(watch()).run(seconds(20, lambda t: t**2)).starved_steps == 0


def test_a_plateau_after_a_climb_keeps_what_it_uses_and_a_reserve() -> None:
    trace = Trace(watch()).run(seconds(60, lambda t: min(500, 100 * t)))
    free = OWN + trace.borrowed - 500
    assert EXTENT <= free < 3 * EXTENT + EXTENT
    settled = [at_s for at_s, _ in trace.borrows + trace.returns]
    assert max(settled) < 25, "after that it is quiet"


def test_a_burst_is_given_back_after_the_hold_time_and_not_before() -> None:
    trace = Trace(watch()).run(seconds(60, lambda t: 600 if 5 <= t < 6 else 30))
    assert len(trace.borrows) <= 3
    burst_blocks_s = (600 - 30) / 0.5  # as the rate sees a jump
    assert sum(count for _, count in trace.borrows) <= 600 + burst_blocks_s * trace.watch.horizon_s + 2 * EXTENT
    first, last = trace.returns[0][0], trace.returns[-1][0]
    assert first >= 5 + 5 and last <= 6 + 5 + STEP_S
    assert trace.borrowed == 0, "all of it: its own blocks are enough"


def test_what_was_borrowed_just_now_stays_for_the_hold_time() -> None:
    trace = Trace(watch()).run(seconds(30, lambda t: 50 if t < 20 else 600))
    early = [at_s for at_s, _ in trace.returns]
    assert trace.borrows and all(at_s >= 25 for at_s in early)


@pytest.mark.parametrize("period_s", [0.2, 1.0, 3.0, 4.5])
def test_a_load_that_comes_and_goes_within_the_hold_time_does_not_flap(period_s: float) -> None:
    trace = Trace(watch()).run(seconds(120, lambda t: 300 + 200 * math.sin(2 * math.pi * t / period_s)))
    late = [at_s for at_s, _ in trace.borrows + trace.returns if at_s > 30]
    assert late == [], "after the first periods it has what the peaks need and keeps it"
    assert trace.borrowed >= 500 - OWN


def test_a_load_that_hovers_at_an_extents_edge_does_not_flap() -> None:
    noise = itertools.cycle([0, 1, 0, -1])
    trace = Trace(watch()).run([OWN + next(noise) for _ in range(4000)])
    assert len(trace.borrows) <= 2 and trace.returns == []


def test_a_load_that_comes_and_goes_more_slowly_moves_blocks_once_a_period() -> None:
    trace = Trace(watch()).run(seconds(300, lambda t: 500 if t % 60 < 30 else 50))
    assert [round(at_s) % 60 for at_s, _ in trace.borrows] == [0] * 5
    assert all(at_s % 30 >= 4.9 for at_s, _ in trace.returns)


def test_requests_that_wait_for_memory_count_though_nothing_grows() -> None:
    observer = watch()
    for step in range(200):
        observer.observe(step * STEP_S, OWN, OWN, waiting_blocks=90)
    assert observer.rate_blocks_s == 0
    assert observer.blocks_to_borrow() == 4 * EXTENT  # 90 and a reserve of an extent
    observer.observe(10.0, OWN, OWN + 4 * EXTENT, waiting_blocks=90)
    assert observer.blocks_to_borrow() == 0


def test_blocks_that_somebody_waits_for_are_not_given_back() -> None:
    observer = watch()
    for step in range(200):
        observer.observe(step * STEP_S, 50, 50 + 10 * EXTENT, waiting_blocks=6 * EXTENT)
    assert observer.blocks_to_return(10 * EXTENT) == 2 * EXTENT


def test_not_before_a_whole_hold_time_was_seen_and_never_more_than_is_borrowed() -> None:
    observer = watch()
    observer.observe(0.0, 0, 10 * EXTENT)
    observer.observe(4.9, 0, 10 * EXTENT)
    assert observer.blocks_to_return(100) == 0
    observer.observe(5.0, 0, 10 * EXTENT)
    assert observer.blocks_to_return(10 * EXTENT) == 8 * EXTENT
    assert observer.blocks_to_return(5) == 5
    assert observer.blocks_to_return(0) == 0


def test_blocks_that_came_a_moment_ago_stay_for_the_hold_time() -> None:
    """Though nothing ever needed them: whoever asked for them may be about to."""
    observer = watch()
    for at_s in (0.0, 10.0):
        observer.observe(at_s, 0, 0)
    observer.observe(10.1, 0, 10 * EXTENT)
    observer.observe(15.0, 0, 10 * EXTENT)
    assert observer.blocks_to_return(10 * EXTENT) == 0
    observer.observe(15.2, 0, 10 * EXTENT)
    assert observer.blocks_to_return(10 * EXTENT) == 8 * EXTENT


def test_growth_holds_blocks_back() -> None:
    observer = watch()
    for step in range(400):
        observer.observe(step * STEP_S, step // 10, 20 * EXTENT)
    assert observer.rate_blocks_s > 0
    assert observer.blocks_to_return(20 * EXTENT) == 0


def test_a_slow_grant_counts_at_once_a_fast_one_slowly() -> None:
    observer = DemandWatch(EXTENT, lead_s=0.1, margin_s=0.25)
    assert observer.horizon_s == pytest.approx(0.4)
    observer.granted(0.5)
    assert observer.horizon_s == pytest.approx(1.0)
    observer.granted(0.0)
    assert observer.horizon_s == pytest.approx(0.85)


def test_before_anything_was_seen_there_is_nothing_to_do() -> None:
    assert (watch().blocks_to_borrow(), watch().blocks_to_return(10)) == (0, 0)


@given(st.lists(st.tuples(st.floats(0, 0.5), st.integers(0, 1000)), min_size=1, max_size=50))
def test_the_rate_lies_between_the_slowest_and_the_fastest_growth(steps: list[tuple[float, int]]) -> None:
    observer = watch()
    now_s, used, fastest, slowest = 0.0, 0, 0.0, 0.0
    observer.observe(0.0, 0, 0)
    for passed_s, blocks in steps:
        passed_s += 0.001
        growth = (blocks - used) / passed_s
        fastest, slowest = max(fastest, growth), min(slowest, growth)
        now_s, used = now_s + passed_s, blocks
        observer.observe(now_s, used, 0)
        assert slowest - 1e-6 <= observer.rate_blocks_s <= fastest + 1e-6


def test_two_observations_at_the_same_moment_are_one() -> None:
    once, twice = watch(), watch()
    for observer in (once, twice):
        observer.observe(0.0, 0, 0)
    once.observe(1.0, 10, 0)
    twice.observe(1.0, 10, 0)
    twice.observe(1.0, 10, 0)
    assert once.rate_blocks_s == twice.rate_blocks_s
    twice.observe(1.0, 11, 0)
    assert math.isfinite(twice.rate_blocks_s) and twice.rate_blocks_s > once.rate_blocks_s
    with pytest.raises(ValueError, match="time went back"):
        twice.observe(0.9, 11, 0)


def test_growth_within_a_moment_counts_as_growth_over_a_moment_does() -> None:
    """10 blocks at once are 20 blocks/s in a mean over half a second, on a coarse clock and on a fine one."""
    for passed_s in (0.0, 1e-9):
        observer = watch(rate_window_s=0.5)
        observer.observe(1.0, 0, 0)
        observer.observe(1.0 + passed_s, 10, 0)
        assert observer.rate_blocks_s == pytest.approx(20.0)


@pytest.mark.parametrize(
    "wrong", [{"hold_s": 0.0}, {"rate_window_s": 0.0}, {"lead_s": -1.0}, {"margin_s": -1.0}, {"extent_blocks": 0}]
)
def test_nonsense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="extent_blocks"):
        DemandWatch(**{"extent_blocks": EXTENT, **wrong})  # type: ignore[arg-type]
