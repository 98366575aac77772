"""Which lender is best: free capacity 40 %, link speed 30 %, idle time 30 %. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FREE_WEIGHT = 0.40
LINK_WEIGHT = 0.30
IDLE_WEIGHT = 0.30


@dataclass(frozen=True, slots=True)
class Candidate:
    """A lender that has room, as seen by one borrower. All three inputs are measured.

    Attributes:
        name: of the lender.
        lendable_bytes: what it may still lend.
        transfer_s: for the bytes in question from the borrower to the lender and home again; blocks that are lent
            come back one day, so both directions count.
        idle_s: since it last computed.
    """

    name: str
    lendable_bytes: int
    transfer_s: float
    idle_s: float


def scores(candidates: Sequence[Candidate]) -> dict[str, float]:
    """The score of each candidate, 0 to 1, best highest::

        0.40 * lendable / largest lendable  +  0.30 * link speed / fastest link  +  0.30 * idle / longest idle

    with largest, fastest and longest taken over the candidates. Link speed is bytes over `transfer_s`, so its share
    is the fastest candidate's `transfer_s` over one's own. An input that is 0 for all counts 0 for all.
    """
    if not candidates:
        return {}
    largest = max(candidate.lendable_bytes for candidate in candidates)
    longest = max(candidate.idle_s for candidate in candidates)
    fastest_s = min(candidate.transfer_s for candidate in candidates)
    return {
        candidate.name: FREE_WEIGHT * _share(candidate.lendable_bytes, largest)
        + LINK_WEIGHT * (1.0 if candidate.transfer_s <= fastest_s else fastest_s / candidate.transfer_s)
        + IDLE_WEIGHT * _share(candidate.idle_s, longest)
        for candidate in candidates
    }


def _share(value: float, most: float) -> float:
    return value / most if most > 0 else 0.0
