"""What is computed again first, and where."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

from core.routing.affinity import ReplicaLoad
from core.routing.recovery import Interrupted, recovery_order, spread


def lost(name: str, context: int, arrival: int = 0, priority: int = 0, **cached: int) -> Interrupted:
    return Interrupted(name, priority, arrival, context, 100, cached)


def test_priority_then_the_shortest_then_arrival() -> None:
    requests = [lost("long", 900, 0), lost("second", 50, 4), lost("first", 50, 2), lost("urgent", 2000, 9, -1)]
    assert [one.request_id for one in recovery_order(requests)] == ["urgent", "first", "second", "long"]


def test_no_order_lets_streams_wait_less_on_the_mean() -> None:
    requests = [lost(str(size), size) for size in (700, 30, 4000, 250)]

    def waited(order: Sequence[Interrupted]) -> int:
        done = total = 0
        for one in order:
            done += one.context_tokens
            total += done
        return total

    assert waited(recovery_order(requests)) == min(map(waited, permutations(requests)))


def test_what_is_lost_is_spread_over_those_that_are_left() -> None:
    loads = [ReplicaLoad(name, 0, 1000.0, 0, 64, 0.02) for name in ("a", "b")]
    chosen = spread([lost(str(index), 1000, index) for index in range(6)], loads)
    assert sorted(chosen.values()) == ["a"] * 3 + ["b"] * 3
    assert spread([lost("x", 1000, b=960)], loads) == {"x": "b"}
    assert spread([lost("x", 1000)], []) == {}
