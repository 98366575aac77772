"""`VRAMLendingPool`: who lends how much to whom, and what has to come back.

Policy alone: no tensors, no threads, no clock of its own. The engine thread calls it between steps, and moves blocks as
it says. A round of the coordinator::

    observe(device, ...)            for each device: what it uses itself, what others take, how long it was idle
    for reclaim in reclaims():      move `bytes_to_move(...)` of it: to the owner, another lender or main memory;
        release(...)                                            once the whole lease is empty
    borrow(...) or borrow_at_most(...), then activate(...)      when `DemandWatch` says that blocks will be short

Memory counts as lent from `borrow` to `release`; the coordinator reserves it on the lender's `DeviceBudget`
for as long.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum

from core.costs import LinkTopology
from core.devices.device import machine_of
from core.lending.budget import GPUBudget
from core.lending.lease import Lease, LeaseState, Urgency
from core.lending.lender import Lender
from core.lending.reclaim import Cause, Need, Reclaim, allot
from core.lending.score import Candidate, scores

REFUSED_S = 5.0
"""How long a lender is not asked that has memory on paper and could not allocate it: a card's may be in pieces."""


class Kind(IntEnum):
    """What a lender is to a borrower, the nearest first."""

    BESIDE = 0
    """A device of the same machine."""
    FAR = 1
    """A device of another one."""
    MAIN_MEMORY = 2
    """That of the same machine."""


@dataclass(frozen=True, slots=True)
class LendingStats:
    """Snapshot. Since the start: `borrows`, the leases granted by `(borrower, lender)`, `bytes_lent_total` by all of
    them, and `reclaims`, the needs of lenders by urgency, where one that becomes more urgent counts again; all
    urgencies are there. Now: `active_leases`, in whatever state, and `VRAMLendingPool.capacity_bytes`.
    """

    borrows: Mapping[tuple[str, str], int]
    reclaims: Mapping[Urgency, int]
    bytes_lent_total: int
    active_leases: int
    capacity_bytes: int


class VRAMLendingPool:
    """The leases between `budgets`. Used by the engine thread alone.

    Devices do not lend to each other in pairs: one that has lent asks for its memory back (`request_reclaim`) before it
    can borrow from its own borrower. They lend to devices of other machines (see `machine_of`) only where `far` says
    so: what is worth its cost is for whoever plans to say. Main memory never does.

    Args:
        budgets: of all devices that may borrow or lend, main memory (`last_resort`) included; nothing is lent yet.
        links: between them, measured; by which lenders are scored.
        lend_ratio: largest share of its total memory that a GPU lends, 0 to 1 (`VRM_LEND_RATIO`).
        reclaim_threshold: utilisation at and above which a lender lends nothing and wants back what it lent, above 0,
            at most 1 (`VRM_RECLAIM_THRESHOLD`).
        clock: seconds, never going back.
        far: pairs of a borrower and a lender of another machine.

    Raises `ValueError` for a share out of its range, the same name twice, or a budget that has lent.
    """

    def __init__(
        self,
        budgets: Iterable[GPUBudget],
        links: LinkTopology,
        *,
        lend_ratio: float,
        reclaim_threshold: float,
        clock: Callable[[], float],
        far: Collection[tuple[str, str]] = (),
    ) -> None:
        if not (0 <= lend_ratio <= 1 and 0 < reclaim_threshold <= 1):
            raise ValueError(f"lend ratio {lend_ratio}, reclaim threshold {reclaim_threshold}")
        self._lenders: dict[str, Lender] = {}
        for budget in budgets:
            if budget.name in self._lenders or budget.lent_bytes:
                raise ValueError(f"{budget.name} is there twice, or has lent before it starts")
            self._lenders[budget.name] = Lender(budget)
        self._links = links
        self._lend_ratio = lend_ratio
        self._threshold = reclaim_threshold
        self._clock = clock
        self._far = frozenset(far)
        self._leases: dict[int, Lease] = {}
        self._last_id = 0
        self._borrows: Counter[tuple[str, str]] = Counter()
        self._reclaims = dict.fromkeys(Urgency, 0)
        self._bytes_lent_total = 0
        for lender in self._lenders.values():
            self._refresh(lender)

    # -- what is ----------------------------------------------------------------------------------------------------

    def budget(self, device: str) -> GPUBudget:
        """The device's memory as last observed, with what it lent."""
        return self._lender(device).budget

    def lease(self, lease_id: int) -> Lease:
        """A lease that is not released. Raises `ValueError` if there is none with this id (any longer)."""
        if lease_id not in self._leases:
            raise ValueError(f"there is no lease {lease_id}")
        return self._leases[lease_id]

    def leases(self, *, borrower: str | None = None, lender: str | None = None) -> tuple[Lease, ...]:
        """All leases that are not released, oldest first; of one borrower or lender where given."""
        return tuple(
            lease
            for lease in self._leases.values()
            if borrower in (None, lease.borrower) and lender in (None, lease.lender)
        )

    def lent_bytes(self) -> int:
        """What is lent, over all lenders."""
        return sum(lender.budget.lent_bytes for lender in self._lenders.values())

    def capacity_bytes(self) -> int:
        """What the pool can hold: what is lent and not asked back, and what lenders would lend now. Main memory counts
        like any lender."""
        asked_back = sum(lease.reclaim_bytes for lease in self._leases.values())
        further = sum(lender.lendable_bytes(self._lend_ratio) for lender in self._lenders.values())
        return self.lent_bytes() - asked_back + further

    def stats(self) -> LendingStats:
        """A snapshot that does not change any more."""
        return LendingStats(
            borrows=dict(self._borrows),
            reclaims=dict(self._reclaims),
            bytes_lent_total=self._bytes_lent_total,
            active_leases=len(self._leases),
            capacity_bytes=self.capacity_bytes(),
        )

    def observe(self, device: str, *, own_bytes: int, external_bytes: int, idle_s: float) -> None:
        """Say what a device uses itself, what others take of it (see `GPUBudget`) and since when it is idle.

        It may exceed the limit: that is a reclaim (`reclaims`).
        """
        lender = self._lender(device)
        lender.budget = replace(lender.budget, own_bytes=own_bytes, external_bytes=external_bytes, idle_s=idle_s)
        lender.unobserved = False
        self._refresh(lender)

    # -- borrowing --------------------------------------------------------------------------------------------------

    def lenders(self, borrower: str, nbytes: int) -> tuple[str, ...]:
        """Those with room for `nbytes`, best score first (ties: in the order of `budgets`): devices of the same
        machine, then of others, main memory last."""
        rated = [scores(self._candidates(borrower, nbytes, kind)) for kind in Kind]
        return tuple(name for group in rated for name in sorted(group, key=lambda name: -group[name]))

    def offers(self, borrower: str, unit_bytes: int) -> dict[str, int]:
        """How many pages of `unit_bytes` each lender has room for, largest first, devices of other machines behind
        those of the same, main memory last; only those with room. Their sum is what the borrower can get at most.

        Raises `ValueError` for a borrower that is unknown or main memory, or pages without bytes.
        """
        if unit_bytes < 1:
            raise ValueError(f"pages of {unit_bytes} bytes")
        rooms = [self._candidates(borrower, unit_bytes, kind) for kind in Kind]
        ordered = [lender for room in rooms for lender in sorted(room, key=lambda lender: -lender.lendable_bytes)]
        return {lender.name: lender.lendable_bytes // unit_bytes for lender in ordered}

    def largest_offer(self, borrower: str, unit_bytes: int) -> tuple[str, int] | None:
        """The GPU with room for most pages of `unit_bytes`, and for how many; one of another machine if none of the
        same has room for one, then main memory; else None."""
        return next(iter(self.offers(borrower, unit_bytes).items()), None)

    def borrow(self, borrower: str, nbytes: int, blocks: int, priority: int = 0) -> Lease | None:
        """Set `nbytes`, room for `blocks` pages, aside at the best lender: a lease that is GRANTED.

        All or nothing, from one lender: None if nobody has as much (`borrow_at_most` takes less). Another machine lends
        only if no GPU of the same has room for one page, and main memory only if no GPU has.

        Raises `ValueError` for a borrower that is unknown or main memory, or no bytes or blocks.
        """
        if blocks < 1 or nbytes < blocks:
            raise ValueError(f"{borrower} cannot borrow {blocks} blocks in {nbytes} bytes")
        best = next(iter(self.lenders(borrower, nbytes)), None)
        if best is None:
            return None
        lender = self._lenders[best]
        kind = self.kind(borrower, best)
        assert kind is not None
        if any(self._candidates(borrower, -(-nbytes // blocks), nearer) for nearer in Kind if nearer < kind):
            return None
        self._last_id += 1
        lease = Lease(self._last_id, borrower, best, nbytes, blocks, priority, self._clock())
        self._leases[lease.lease_id] = lease
        self._borrows[borrower, best] += 1
        self._bytes_lent_total += nbytes
        lender.budget = replace(lender.budget, lent_bytes=lender.budget.lent_bytes + nbytes)
        return lease

    def borrow_at_most(self, borrower: str, unit_bytes: int, blocks: int, priority: int = 0) -> Lease | None:
        """Like `borrow` for `blocks` pages of `unit_bytes`, or for as many as the largest offer has room for."""
        lease = self.borrow(borrower, blocks * unit_bytes, blocks, priority)
        if lease is not None:
            return lease
        offer = self.largest_offer(borrower, unit_bytes)
        units = 0 if offer is None else min(blocks, offer[1])
        return self.borrow(borrower, units * unit_bytes, units, priority) if units else None

    def refuse(self, lease_id: int) -> None:
        """The lender turned out to have no memory for the lease, which ends; for `REFUSED_S` others are asked."""
        lender = self._lenders[self.lease(lease_id).lender]
        self.release(lease_id)
        lender.refused_until_s = self._clock() + REFUSED_S

    def activate(self, lease_id: int) -> None:
        """Blocks move in from now on. Raises `ValueError` unless the lease is GRANTED: none moves in under reclaim."""
        lease = self.lease(lease_id)
        if lease.state is not LeaseState.GRANTED:
            raise ValueError(f"lease {lease_id} is {lease.state.value}, no block may move in")
        lease.move_to(LeaseState.ACTIVE)
        lease.used = True

    def release(self, lease_id: int) -> None:
        """The lease is empty and the lender's again. Raises `ValueError` if it is released already."""
        lease = self.lease(lease_id)
        lease.move_to(LeaseState.RELEASED)
        lease.reclaim_bytes, lease.urgency, lease.deadline_s = 0, None, None
        del self._leases[lease_id]
        self._lenders[lease.lender].came_back(lease.nbytes)
        self._refresh(self._lenders[lease.lender])

    # -- reclaiming -------------------------------------------------------------------------------------------------

    def request_reclaim(self, lender: str, nbytes: int | None, urgency: Urgency) -> int:
        """Ask for `nbytes` of what a device lent, beyond what its state asks for; for its own stage's need, or a call.

        None is for all of it and for good (shutdown): it lends nothing until `reopen`. Otherwise it lends nothing
        until the bytes are back and `observe` has said what it uses now.

        Returns how many bytes will come back for this request: fewer where less is lent, or was asked for already.
        """
        if nbytes is not None and nbytes < 0:
            raise ValueError(f"{lender} cannot ask for {nbytes} bytes")
        state = self._lender(lender)
        left = state.unasked_bytes()
        granted = left if nbytes is None else min(nbytes, left)
        if nbytes is None:
            state.withdrawn = max(urgency, state.withdrawn or urgency)
        elif granted:
            state.needs.append(Need(Cause.REQUEST, granted, urgency, self._clock() + urgency.bound_s))
            self._reclaims[urgency] += 1
        self._refresh(state)
        return granted

    def reopen(self, lender: str) -> None:
        """A device that withdrew lends again; what it has not got back stays lent."""
        state = self._lender(lender)
        state.withdrawn = None
        self._refresh(state)

    def reclaims(self) -> list[Reclaim]:
        """What has to come back now, over all lenders, the most urgent first; for each lender low priority first, then
        youngest first, and no more than it needs. Their leases are RECLAIMING.

        A lease may be there several times, with parts that are not equally urgent. `nbytes` need not be a whole number
        of pages. Leases go back whole.
        """
        found = [reclaim for lender in self._lenders.values() for reclaim in self._refresh(lender)]
        return sorted(found, key=lambda reclaim: (-reclaim.urgency, reclaim.deadline_s))

    # -- audit ------------------------------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Raise `AssertionError` unless all leases are sound, every device lent exactly its leases, none lent more
        than the ratio allows, whatever is over a limit is under reclaim, and no two devices lend to each other."""
        pairs = set()
        for lease in self._leases.values():
            lease.check_invariants()
            pairs.add((lease.borrower, lease.lender))
        if any((lender, borrower) in pairs for borrower, lender in pairs):
            raise AssertionError(f"two devices lend to each other: {sorted(pairs)}")
        for name, lender in self._lenders.items():
            budget, leases = lender.budget, self.leases(lender=name)
            if budget.lent_bytes != sum(lease.nbytes for lease in leases):
                raise AssertionError(f"{name} lent {budget.lent_bytes} bytes, its leases are {leases}")
            empty = replace(budget, own_bytes=0, external_bytes=0, lent_bytes=0)
            if budget.lent_bytes > empty.lendable_bytes(self._lend_ratio):
                raise AssertionError(f"{name} lent more than it may: {budget}")
            wanted = min(budget.lent_bytes, sum(need.nbytes for need in lender.needs))
            if wanted != sum(lease.reclaim_bytes for lease in leases):
                raise AssertionError(f"{name} needs {wanted} bytes, its leases are {leases}")
            if wanted < min(budget.shortfall_bytes, budget.lent_bytes):
                raise AssertionError(f"{name} is over its limit and asks for {wanted} bytes: {budget}")

    # -- insides ----------------------------------------------------------------------------------------------------

    def _lender(self, device: str) -> Lender:
        if device not in self._lenders:
            raise ValueError(f"unknown device {device!r}, there are {', '.join(self._lenders)}")
        return self._lenders[device]

    def kind(self, borrower: str, lender: str) -> Kind | None:
        """What a lender is to a borrower; None if it does not lend to it."""
        beside = machine_of(lender) == machine_of(borrower)
        if self._lenders[lender].budget.last_resort:
            return Kind.MAIN_MEMORY if beside else None
        if beside:
            return Kind.BESIDE
        return Kind.FAR if (borrower, lender) in self._far else None

    def _candidates(self, borrower: str, nbytes: int, kind: Kind) -> list[Candidate]:
        """Those of a kind that can lend `nbytes`: not those that borrow from the borrower themselves."""
        if self._lender(borrower).budget.last_resort:
            raise ValueError(f"{borrower} is main memory, it does not borrow")
        indebted = {lease.borrower for lease in self._leases.values() if lease.lender == borrower}
        now_s, link = self._clock(), self._links.copying
        return [
            Candidate(
                name,
                lender.lendable_bytes(self._lend_ratio),
                link(borrower, name).transfer_s(nbytes) + link(name, borrower).transfer_s(nbytes),
                lender.budget.idle_s,
            )
            for name, lender in self._lenders.items()
            if name != borrower
            and self.kind(borrower, name) is kind
            and name not in indebted
            and lender.refused_until_s <= now_s
            and lender.lendable_bytes(self._lend_ratio) >= max(1, nbytes)
        ]

    def _refresh(self, lender: Lender) -> list[Reclaim]:
        """Bring needs and leases into line with the lender's state."""
        asked = bool(lender.needs)
        for urgency in lender.refresh(self._threshold, self._clock()):
            self._reclaims[urgency] += 1
        if not (asked or lender.needs):  # every step comes here: nothing to sort while nothing is wanted
            return []
        return allot(lender.needs, self.leases(lender=lender.budget.name))
