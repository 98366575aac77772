"""What lenders need back, how urgently, and from which leases. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from core.lending.budget import GPUBudget
from core.lending.lease import Lease, Urgency


class Cause(Enum):
    """Why a lender wants memory back."""

    THRESHOLD = "threshold"
    """It uses so much itself that it does not lend any more: everything it lent."""
    SHORTFALL = "shortfall"
    """More is taken than may be: what is over the limit."""
    REQUEST = "request"
    """A call, or its own stage's need: a number of bytes."""
    WITHDRAWAL = "withdrawal"
    """It stops lending, at shutdown or by a call: everything it lent."""


@dataclass(slots=True)
class Need:
    """What one lender wants back for one cause.

    Attributes:
        cause: why.
        nbytes: how many bytes are still wanted. Leases round up to whole blocks.
        urgency: the highest since the need came up; it does not fall while the need lasts.
        deadline_s: the earliest that was announced. It belongs to the need and not to a lease, so that a change of
            priorities, which sends the need to another lease, does not put it off.
    """

    cause: Cause
    nbytes: int
    urgency: Urgency
    deadline_s: float

    def raise_to(self, urgency: Urgency, now_s: float) -> bool:
        """Make it at least this urgent; whether that is more than before."""
        if urgency <= self.urgency:
            return False
        self.urgency, self.deadline_s = urgency, min(self.deadline_s, now_s + urgency.bound_s)
        return True


@dataclass(frozen=True, slots=True)
class Reclaim:
    """`nbytes` of one lease are to be given back by `deadline_s` (on the pool's clock)."""

    lease_id: int
    nbytes: int
    cause: Cause
    urgency: Urgency
    deadline_s: float


def pressures(budget: GPUBudget, threshold: float) -> dict[Cause, tuple[int, Urgency]]:
    """What the state of a lender asks back: bytes and urgency by cause. Nothing where nothing is lent.

    `threshold` is `VRM_RECLAIM_THRESHOLD`. How urgent it is all in all follows from how far the lender is over:

    ========  ===================================================================================================
    nothing   utilisation below the threshold and everything within the limit, or nothing is lent
    LOW       utilisation at or above the threshold
    MEDIUM    utilisation at or above the middle between threshold and 1 (0.90 for a threshold of 0.80)
    HIGH      own, external and lent bytes exceed the limit, but not the total: they are in the safety margin
    CRITICAL  they exceed the total: the next allocation on the card fails
    ========  ===================================================================================================

    Where limit and total are the same there is no margin, and whatever is over the limit is CRITICAL.
    """
    found: dict[Cause, tuple[int, Urgency]] = {}
    lent = budget.lent_bytes
    if lent and budget.utilisation >= threshold:
        halfway = (1 + threshold) / 2
        found[Cause.THRESHOLD] = lent, Urgency.MEDIUM if budget.utilisation >= halfway else Urgency.LOW
    if lent and budget.shortfall_bytes:
        taken = budget.own_bytes + budget.external_bytes + lent
        urgency = Urgency.CRITICAL if taken > budget.total_bytes else Urgency.HIGH
        found[Cause.SHORTFALL] = min(lent, budget.shortfall_bytes), urgency
    return found


def reclaim_order(leases: Iterable[Lease]) -> list[Lease]:
    """Low priority first; of the same priority the youngest first: old leases hold the coldest blocks, which are
    missed least where they are."""
    return sorted(leases, key=lambda lease: (lease.priority, -lease.granted_s, -lease.lease_id))


def allot(needs: Iterable[Need], leases: Iterable[Lease]) -> list[Reclaim]:
    """Divide what one lender needs among its leases, only as many as are needed, and mark these.

    The most urgent need takes its bytes from the leases that go first, the next one from what these leave. A lease
    may serve several needs, which are a `Reclaim` each, so that a small urgent need does not make a large lease
    urgent; its own `urgency` and `deadline_s` are those of the first. Leases that serve none are left alone, those
    under reclaim are what they were before. Returns the most urgent first.
    """
    ordered = reclaim_order(leases)
    found: list[Reclaim] = []
    wanted = {lease.lease_id: 0 for lease in ordered}
    for need in sorted(needs, key=lambda need: (-need.urgency, need.deadline_s)):
        left = need.nbytes
        for lease in ordered:
            part = min(left, lease.nbytes - wanted[lease.lease_id])
            if part == 0:
                continue
            left -= part
            wanted[lease.lease_id] += part
            found.append(Reclaim(lease.lease_id, part, need.cause, need.urgency, need.deadline_s))
    for lease in ordered:
        mine = [reclaim for reclaim in found if reclaim.lease_id == lease.lease_id]
        if mine:
            deadline_s = min(reclaim.deadline_s for reclaim in mine)
            lease.ask_back(wanted[lease.lease_id], mine[0].urgency, deadline_s)
        else:
            lease.leave()
    return found
