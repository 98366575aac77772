"""Requests whose device, node or replica is lost: in which order they are computed again, and where.

Streams stand still until their tokens have been computed again, one after another. The mean wait is least if those with
the least to compute come first (shortest processing time first); none starves, since the set is closed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from core.routing.affinity import ReplicaLoad, choose, with_request


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A request that was lost on the way.

    Attributes:
        request_id: whatever names it.
        priority: lower is served earlier, as in the queue.
        arrival: a running number.
        context_tokens: prompt and output so far, which have to be computed again.
        output_left: tokens that it is expected to give still.
        cached_tokens: of the context, by replica.
    """

    request_id: str
    priority: int
    arrival: int
    context_tokens: int
    output_left: int
    cached_tokens: Mapping[str, int]


def recovery_order(lost: Sequence[Interrupted]) -> list[Interrupted]:
    """By priority, then the shortest context, then arrival."""
    return sorted(lost, key=lambda one: (one.priority, one.context_tokens, one.arrival))


def spread(lost: Sequence[Interrupted], loads: Sequence[ReplicaLoad]) -> dict[str, str]:
    """The replica for each request id, in the order of recovery; each counts as load for those behind it.

    Empty if there is no replica.
    """
    by_name = {load.name: load for load in loads}
    chosen: dict[str, str] = {}
    for one in recovery_order(lost):
        found = choose(list(by_name.values()), one.context_tokens, one.cached_tokens, one.output_left)
        if found is not None:
            chosen[one.request_id] = found.name
            cached = one.cached_tokens.get(found.name, 0)
            by_name[found.name] = with_request(found, one.context_tokens, cached)
    return chosen
