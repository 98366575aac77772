"""Where a request goes: prefix against load, on replicas that are not equal."""

from __future__ import annotations

from dataclasses import replace

import pytest

from core.routing.affinity import MOST_DRAWN, MOST_MATCHED, ReplicaLoad, candidates, choose, cost_s, with_request

FAST = ReplicaLoad("fast", waiting_tokens=0, prefill_tok_s=4000.0, streams=2, max_streams=8, token_s=0.02)
SLOW = replace(FAST, name="slow", prefill_tok_s=1000.0, token_s=0.05)
TWIN = replace(FAST, name="twin")


@pytest.mark.parametrize(
    ("loads", "cached", "chosen"),
    [
        pytest.param([TWIN, FAST], {"fast": 1920}, "fast", id="of equal ones the one with the prefix"),
        pytest.param([SLOW, FAST], {}, "fast", id="without a prefix the faster one"),
        pytest.param([SLOW, FAST], {"slow": 640}, "fast", id="what a prefix spares is less than being slow costs"),
        pytest.param(
            [replace(SLOW, token_s=0.02), replace(FAST, prefill_tok_s=200.0)], {"slow": 1920}, "slow",
            id="or more",
        ),
        pytest.param([TWIN, replace(FAST, waiting_tokens=60000)], {"fast": 1920}, "twin", id="a prefix behind a queue"),
        pytest.param([replace(FAST, streams=40), SLOW], {}, "slow", id="a fast one whose KV is full"),
        pytest.param([replace(TWIN, streams=3), FAST], {}, "fast", id="of equal costs the one with fewer streams"),
        pytest.param([TWIN, FAST], {}, "twin", id="of equal ones the first"),
    ],
)  # fmt: skip
def test_what_is_there_first_is_chosen(loads: list[ReplicaLoad], cached: dict[str, int], chosen: str) -> None:
    found = choose(loads, 2000, cached, 100)
    assert found is not None
    assert found.name == chosen


def test_the_cost_is_in_seconds() -> None:
    load = replace(FAST, waiting_tokens=2000)
    assert cost_s(load, 3000, 1000, 100) == pytest.approx((2000 + 2000) / 4000 + 100 * 0.02)
    full = replace(FAST, streams=8)
    assert cost_s(full, 4000, 0, 100) == pytest.approx(1 + (1 + 1 / 8) * 2)
    assert cost_s(FAST, 100, 100, 0) == pytest.approx(1 / 4000)  # the last token is computed at any rate


def test_no_replica_is_no_choice() -> None:
    assert choose([], 10, {}) is None


def test_requests_that_are_routed_count_for_the_next_one() -> None:
    loads = {load.name: load for load in (FAST, TWIN)}
    went = []
    for _ in range(4):
        found = choose(list(loads.values()), 2000, {})
        assert found is not None
        loads[found.name] = with_request(found, 2000, 0)
        went.append(found.name)
    assert went == ["fast", "twin", "fast", "twin"]


def test_of_many_replicas_those_with_prefixes_and_some_others_are_looked_at() -> None:
    names = [f"r{index}" for index in range(200)]
    cached = {f"r{index}": 128 * index for index in range(50, 90)} | {"gone": 10**6}
    seen = set()
    for draw in range(len(names)):
        found = candidates(names, cached, draw)
        assert found[:MOST_MATCHED] == [f"r{index}" for index in range(89, 89 - MOST_MATCHED, -1)]
        assert len(found) == len(set(found)) <= MOST_MATCHED + MOST_DRAWN
        seen |= set(found)
    assert seen >= set(names[: MOST_DRAWN * (200 // MOST_DRAWN)])  # every one has its turn
    assert candidates(names[:5], cached, 7) == names[:5]
