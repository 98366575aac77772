"""The formula of hotness, and that its order never depends on when it is asked."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.tiers.hotness import HEAT_BOUNDS, Heat, HeatModel, HeatSpread, HeatTable

HALF_LIFE_S = 10.0


def heat_after(model: HeatModel, uses: list[float]) -> Heat:
    heat = None
    for use_s in sorted(uses):
        heat = model.used(heat, use_s)
    assert heat is not None
    return heat


@pytest.mark.parametrize(
    ("weight", "uses", "now_s", "score"),
    [
        (0.5, [0.0], 0.0, 1.0),
        (0.5, [0.0], 10.0, 0.5),
        (0.5, [0.0], 30.0, 0.125),
        (0.5, [0.0, 0.0], 0.0, 1.5),  # (2 + 1) / 2
        (0.5, [0.0, 10.0], 10.0, 1.25),  # (1.5 + 1) / 2
        (1.0, [0.0, 10.0, 20.0], 20.0, 1.75),  # LFU: 1/4 + 1/2 + 1
        (0.0, [0.0, 10.0, 20.0], 30.0, 0.5),  # LRU: only the last one counts
        (0.5, [0.0], 1e9, 0.0),
    ],
)
def test_scores(weight: float, uses: list[float], now_s: float, score: float) -> None:
    model = HeatModel(HALF_LIFE_S, weight)
    assert model.score(heat_after(model, uses), now_s) == pytest.approx(score)


@given(
    st.lists(st.lists(st.floats(0, 100), min_size=1, max_size=6), min_size=2, max_size=5),
    st.floats(100, 300),
    st.floats(0, 1),
)
def test_order_agrees_with_score_at_any_time(histories: list[list[float]], now_s: float, weight: float) -> None:
    model = HeatModel(HALF_LIFE_S, weight)
    heats = [heat_after(model, uses) for uses in histories]
    for one, other in itertools.combinations(heats, 2):
        scores = model.score(one, now_s), model.score(other, now_s)
        if abs(scores[0] - scores[1]) > 1e-9 * max(scores):
            assert (scores[0] < scores[1]) == (model.order(one) < model.order(other))


def test_the_table_remembers_absent_blocks_up_to_a_bound_and_all_held_ones() -> None:
    table = HeatTable(HeatModel(HALF_LIFE_S), max_absent=8)

    def known() -> int:
        return sum(table.score(bytes([number]), 120.0) > 0 for number in range(100))

    table.use(b"held", 0.0)
    table.hold(b"held")
    table.hold(b"held")
    for number in range(100):
        table.use(bytes([number]), 10.0 + number)
    table.let_go(b"held")
    assert table.score(b"held", 0.0) == 1.0 and known() == 8
    assert table.score(bytes([99]), 109.0) == 1.0 and table.score(bytes([0]), 109.0) == 0.0, "the last used stay"
    table.let_go(b"held")
    for number in range(8):
        table.use(bytes([number]), 120.0)
    assert table.score(b"held", 0.0) == 0.0 and known() == 8


def test_the_mean_of_many_is_taken_over_a_sample_of_them() -> None:
    table = HeatTable(HeatModel(HALF_LIFE_S))
    blocks = [number.to_bytes(4, "big") for number in range(5000)]
    for number, name in enumerate(blocks):
        table.use(name, 10.0 * (number % 2))
    spread = table.spread(blocks, 10.0)
    assert (spread.count, spread.mean) == (5000, pytest.approx(0.75, abs=0.01))
    assert spread.below[HEAT_BOUNDS.index(0.25)] == 0
    assert spread.below[HEAT_BOUNDS.index(0.5)] == pytest.approx(2500, abs=50)  # used a half-life ago
    assert spread.below[HEAT_BOUNDS.index(1.0)] == 5000
    assert table.spread([], 0.0) == HeatSpread()


def test_blocks_hotter_than_all_bounds_are_counted_in_the_whole_alone() -> None:
    table = HeatTable(HeatModel(HALF_LIFE_S))
    for _ in range(100):
        table.use(b"hot", 0.0)
    spread = table.spread([b"hot"], 0.0)
    assert (spread.count, spread.below[-1], spread.mean) == (1, 0, 50.5)
