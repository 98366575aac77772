"""The bounded search for many devices beside the exact one, on fleets that both can search; and on larger ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
from placement.fleets import Fleet, random_fleet

from core.placement.orders import good_orders, orders_that_fit
from core.placement.search import PlacementSearch

_CLOSE = 1.03


def _search(fleet: Fleet, *, exact: bool, required: frozenset[int] = frozenset()) -> PlacementSearch:
    search = PlacementSearch(fleet.costs, fleet.devices, fleet.links, required, 10**9 if exact else 0)
    assert search.exact == exact
    return search


@pytest.mark.parametrize("seed", range(24))
def test_plans_of_the_bounded_search_are_within_3_percent_of_the_best(seed: int) -> None:
    fleet = random_fleet(seed)
    exact, bounded = _search(fleet, exact=True), _search(fleet, exact=False)
    assert bounded.fits(fleet.kv_tokens) == exact.fits(fleet.kv_tokens)
    for objective in ("latency", "throughput"):
        best = exact.best(fleet.batch, fleet.kv_tokens, objective)
        found = bounded.best(fleet.batch, fleet.kv_tokens, objective)
        assert (found is None) == (best is None)
        if found is None or best is None:
            continue
        assert fleet.holds(found)
        index = int(objective == "throughput")
        assert fleet.times(found)[index] <= _CLOSE * fleet.times(best)[index]


@pytest.mark.parametrize("seed", [*range(100, 116), 145, 148, 280, 445, 537])
def test_so_are_plans_for_several_batches_in_flight(seed: int) -> None:
    fleet = random_fleet(seed)

    def round_s(search: PlacementSearch) -> float:
        cuts = search.best_round(fleet.batch, fleet.kv_tokens, fleet.cohorts)
        if cuts is None:
            return math.inf
        assert fleet.holds(cuts)
        way_s, busiest_s = fleet.times(cuts)
        return max(way_s, fleet.cohorts * busiest_s)

    assert round_s(_search(fleet, exact=False)) <= _CLOSE * round_s(_search(fleet, exact=True))


def test_an_order_that_was_given_badly_is_no_hindrance() -> None:
    """Devices of two machines in turn, with a slow link between the machines: one hop over it is enough."""
    stages = [np.triu(np.full((4, 5), 1.0), 1) * np.arange(5)[None, :] for _ in range(4)]
    for stage in stages:
        for first in range(4):
            lengths = np.arange(5) - first
            stage[first] = np.where((lengths == 1), 1.0, np.inf)  # one layer fits
    hops = np.where(np.add.outer(np.arange(4), np.arange(4)) % 2 == 1, 100.0, 1.0)
    order = good_orders(stages, hops, [(0, 1, 2, 3)], frozenset())[0]
    assert [device % 2 for device in order] in ([0, 0, 1, 1], [1, 1, 0, 0])


@pytest.mark.parametrize("number", [20, 40])
def test_with_many_devices_plans_hold_and_use_what_they_must(number: int) -> None:
    fleet = random_fleet(7, number, share=0.1)
    search = _search(fleet, exact=False)
    found = search.best(fleet.batch, fleet.kv_tokens, "latency")
    assert found is not None and fleet.holds(found)
    required = frozenset({0, number - 1})
    forced = _search(fleet, exact=False, required=required).best(fleet.batch, fleet.kv_tokens, "latency")
    assert forced is not None and fleet.holds(forced)
    assert required <= {cut.device for cut in forced}
    assert fleet.times(found)[0] <= _CLOSE * fleet.times(forced)[0]


def test_where_memory_is_short_the_order_that_holds_the_model_is_found() -> None:
    """The one device that has room for the head beside a layer has to be the last."""
    # two layers; device 0 holds either one, device 1 only the first
    earliest = [[0, 0, 1], [0, 0, 2]]
    assert orders_that_fit(earliest, [10, 5], [0, 4, 8]) == [(1, 0)]
    assert orders_that_fit([[0, 1, 2], [0, 1, 2]], [1, 1], [0, 4, 8]) == []
