"""`Lender`: one device of the pool, what it wants back and whether it lends. Pure; the pool keeps the leases."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from core.lending.budget import GPUBudget
from core.lending.lease import Urgency
from core.lending.reclaim import Cause, Need, pressures

RESUME_SHARE = 0.95
"""A lender that reached the threshold lends again when its utilisation is below this share of it, so that a need that
hovers there does not send blocks to and fro."""


@dataclass(slots=True)
class Lender:
    """The state of one device. Only the pool writes it.

    Attributes:
        budget: replaced whenever anything changes.
        needs: what it wants back, at most one for each cause but REQUEST. Everything but requests follows from its
            state and is made by `refresh`.
        saturated: it reached the threshold and has not yet come down to `RESUME_SHARE` of it.
        unobserved: bytes that it had asked for came back, and `observe` has not yet said what it did with them; until
            then they are not lent to the next borrower.
        withdrawn: how urgently it stopped lending, until it is opened again.
        refused_until_s: it turned out to have no memory for a lease; until then nobody asks it again.
    """

    budget: GPUBudget
    needs: list[Need] = field(default_factory=list)
    saturated: bool = False
    unobserved: bool = False
    withdrawn: Urgency | None = None
    refused_until_s: float = float("-inf")

    def lendable_bytes(self, lend_ratio: float) -> int:
        """What it lends now: nothing while it wants memory back."""
        if self.needs or self.saturated or self.unobserved or self.withdrawn is not None:
            return 0
        return self.budget.lendable_bytes(lend_ratio)

    def came_back(self, nbytes: int) -> None:
        """Bytes of a lease are the device's again: they cover what it is over its limit, then requests, the most
        urgent first."""
        left = max(0, nbytes - self.budget.shortfall_bytes)
        self.budget = replace(self.budget, lent_bytes=self.budget.lent_bytes - nbytes)
        for request in self._requests():
            covered = min(left, request.nbytes)
            request.nbytes -= covered
            left -= covered
            self.unobserved = self.unobserved or request.nbytes == 0

    def unasked_bytes(self) -> int:
        """How much of what it lent a further request could get."""
        asked = sum(request.nbytes for request in self._requests())
        return max(0, self.budget.lent_bytes - self.budget.shortfall_bytes - asked)

    def refresh(self, threshold: float, now_s: float) -> list[Urgency]:
        """Bring `needs` into line with the state. Returns the urgencies of those that are new, or more urgent than
        before."""
        utilisation, lent = self.budget.utilisation, self.budget.lent_bytes
        self.saturated = utilisation >= threshold * (RESUME_SHARE if self.saturated else 1)
        wanted = pressures(self.budget, threshold)
        if self.withdrawn is not None and lent:
            wanted[Cause.WITHDRAWAL] = lent, self.withdrawn
        known: dict[Cause, Need] = {need.cause: need for need in self.needs if need.cause is not Cause.REQUEST}
        self.needs = self._open_requests()
        announced = []
        for cause, (nbytes, urgency) in wanted.items():
            need = known.get(cause)
            if need is None:
                need = Need(cause, nbytes, urgency, now_s + urgency.bound_s)
                announced.append(urgency)
            elif need.raise_to(urgency, now_s):
                announced.append(urgency)
            need.nbytes = nbytes
            self.needs.append(need)
        return announced

    def _requests(self) -> list[Need]:
        """The most urgent first."""
        requests = [need for need in self.needs if need.cause is Cause.REQUEST]
        return sorted(requests, key=lambda need: (-need.urgency, need.deadline_s))

    def _open_requests(self) -> list[Need]:
        """Those that are not met, the least urgent cut to what is lent beyond the shortfall: a device that uses more
        than before must not go on waiting for bytes that nobody holds."""
        left = max(0, self.budget.lent_bytes - self.budget.shortfall_bytes)
        requests = self._requests()
        for request in requests:
            request.nbytes = min(request.nbytes, left)
            left -= request.nbytes
        return [request for request in requests if request.nbytes]
