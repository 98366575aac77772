"""`KVOverflow`: stages that are short of KV memory borrow it, and give it back. No torch here.

A stage whose device cannot hold a page for every block borrows regions on other devices, an extent of pages each, one
lease each. Which blocks live there, `PageMap` decides; this decides when to borrow, what to give back, and empties a
region that its lender wants back: blocks go home, to another region, to main memory, or, if nobody uses them, away.

A region is handed back once the step that carries its last move has passed all stages, so nothing in flight can
read it. Called by the engine thread between steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from core.errors import OutOfDeviceMemoryError
from core.kv_cache.manager import KVCacheManager
from core.kv_cache.page_ops import LOCAL
from core.kv_cache.stage_pages import Region, StagePages
from core.lending import DemandWatch, Lease, LeaseState, LendingStats, Urgency, VRAMLendingPool, bytes_to_move
from core.lending.homecoming import Homecoming
from core.logs import get_logger

logger = get_logger(__name__)

_LONGEST_STEP_S = 1.0
"""What takes longer from one look to the next is a pause, not a step."""


class RegionStore(Protocol):
    """Allocates and frees the memory of regions."""

    def add(self, stage: int, region_id: int, device: str, pages: int) -> None:
        """Raises `OutOfDeviceMemoryError`, with nothing kept."""

    def drop(self, stage: int, region_id: int) -> None: ...


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """A device as observed: bytes that its stage needs beside pages, bytes that other programs took of it, and how long
    it has been idle."""

    name: str
    own_bytes: int
    external_bytes: int
    idle_s: float


@dataclass(frozen=True, slots=True)
class StagePagesView:
    """Where the pages of a stage that borrows are; `blocks_away` are blocks whose page is on another device."""

    stage: int
    device: str
    local_pages: int
    borrowed_pages: int
    blocks_away: int
    page_bytes: int


@dataclass(frozen=True, slots=True)
class LeaseView:
    """Memory that one device lends to another."""

    id: int
    borrower: str
    lender: str
    bytes: int
    blocks: int
    state: str
    priority: int
    age_seconds: float


@dataclass(frozen=True, slots=True)
class OverflowView:
    """What monitoring shows, as it was between two steps. `moved_out` and `moved_home` count blocks since the start,
    `decisions` what became of blocks that were away when there was room at home."""

    stages: tuple[StagePagesView, ...]
    leases: tuple[LeaseView, ...]
    stats: LendingStats
    moved_out: int
    moved_home: int
    decisions: Mapping[str, int]


@dataclass(slots=True)
class _Loan:
    """A leased region. `last_step` is the step after which nothing in flight touches it; None while it has blocks."""

    stage: int
    pages: StagePages
    region_id: int
    lease: Lease
    returning: bool = False
    last_step: int | None = None

    @property
    def region(self) -> Region:
        return self.pages.regions[self.region_id]


class KVOverflow:
    """Borrows for every mapped stage of `kv`. `page_bytes` by stage index; `extent_blocks` pages are borrowed at once.

    `observe` gives the devices' state, at most every `observe_s`; `homecoming` decides what comes home where there is
    room again; `clock` gives seconds.
    """

    def __init__(
        self,
        kv: KVCacheManager,
        lending: VRAMLendingPool,
        store: RegionStore,
        page_bytes: Sequence[int],
        *,
        extent_blocks: int,
        observe: Callable[[], Iterable[DeviceUse]],
        homecoming: Homecoming | None = None,
        observe_s: float = 0.25,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.kv = kv
        self.lending = lending
        self._store = store
        self._page_bytes = tuple(page_bytes)
        self._extent = extent_blocks
        self._observe = observe
        self.homecoming = homecoming
        self._observe_s = observe_s
        self._clock = clock
        self._demand = DemandWatch(extent_blocks)
        self._loans: dict[int, _Loan] = {}
        self._observed_s = float("-inf")
        self._step_s = 0.05
        self._ticked_s: float | None = None
        self.view = self._look()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is lent or about to come back: an engine without work need not look in."""
        return not self._loans

    @property
    def wants_stop(self) -> bool:
        """Whether memory has to come back before the next step computes."""
        return any(
            loan.lease.state is LeaseState.RECLAIMING and loan.lease.urgency is Urgency.CRITICAL
            for loan in self._loans.values()
        )

    # -- borrowing --------------------------------------------------------------------------------------------------

    def borrow(self, blocks: int) -> None:
        """Try to have room for so many blocks more than now; every stage that lacks pages borrows."""
        wanted = min(self.kv.pool.num_blocks, self.kv.pool.limit + blocks)
        started_s = self._clock()
        for index, pages in self.kv.pages.mapped:
            self._borrow_for(index, pages, wanted)
        self.kv.refresh_limit()
        self._demand.granted(self._clock() - started_s)

    def _borrow_for(self, index: int, pages: StagePages, wanted: int) -> None:
        """One region after the other for a stage, until it has `wanted` pages or nobody has memory for more."""
        while pages.backed < wanted:
            missing = min(self.kv.pool.num_blocks, max(wanted, pages.backed + self._extent)) - pages.backed
            spare = 0 if pages.has_spare else 1
            if self._add_region(index, pages, min(missing, self._extent) + spare) is None:
                return

    def _add_region(self, index: int, pages: StagePages, blocks: int) -> _Loan | None:
        """A region of at most so many pages, at whoever lends best."""
        lease = self.lending.borrow_at_most(pages.site, self._page_bytes[index], blocks)
        if lease is None:
            return None
        region_id = next(number for number in count(LOCAL + 1) if number not in self._loans)  # they have to stay small
        try:
            self._store.add(index, region_id, lease.lender, lease.blocks)
        except OutOfDeviceMemoryError as error:
            logger.warning("a lender turned out to have no memory", lender=lease.lender, reason=str(error))
            self.lending.refuse(lease.lease_id)
            return self._add_region(index, pages, blocks)
        kind = self.lending.kind(pages.site, lease.lender)
        pages.add(region_id, lease.lender, lease.blocks, rank=float(kind or 0))
        loan = self._loans[region_id] = _Loan(index, pages, region_id, lease)
        self.lending.activate(lease.lease_id)
        logger.info(
            "KV memory borrowed", borrower=pages.site, lender=lease.lender, blocks=lease.blocks, bytes=lease.nbytes
        )
        return loan

    # -- a round between two steps ----------------------------------------------------------------------------------

    def tick(self, waiting_blocks: int = 0) -> None:
        """Look at the devices, borrow ahead of need, give back what is not needed, empty what is wanted back."""
        now_s = self._clock()
        if self._ticked_s is not None:
            self._step_s += 0.1 * (min(_LONGEST_STEP_S, max(1e-4, now_s - self._ticked_s)) - self._step_s)
        self._ticked_s = now_s
        if now_s - self._observed_s >= self._observe_s:
            self._observed_s = now_s
            for loan in self._loans.values():
                loan.lease.priority = int(any(self.kv.pool.ref_count(block) for block in loan.region.blocks.values()))
            for use in self._observe():
                self.lending.observe(
                    use.name, own_bytes=use.own_bytes, external_bytes=use.external_bytes, idle_s=use.idle_s
                )
            self.view = self._look()
            if self.homecoming is not None:
                self.homecoming.consider(self._step_s, self._reserve())
            self._leave_last_resort()
        self._anticipate(now_s, waiting_blocks)
        self._reclaim(now_s)
        if self.homecoming is not None:
            self.homecoming.move(self._reserve())
        self._release_empty()

    def _reserve(self) -> int:
        """Local pages that are about to be written: one per sequence, and what growth takes until the next look."""
        growth = max(0.0, self._demand.rate_blocks_s) * self._demand.horizon_s
        return len(self.kv.sequences()) + math.ceil(growth)

    def _look(self) -> OverflowView:
        pages = self.kv.pages
        stages = tuple(
            StagePagesView(
                stage=index,
                device=stage.site,
                local_pages=stage.local_pages,
                borrowed_pages=sum(r.num_pages for i, r in stage.regions.items() if i != LOCAL),
                blocks_away=sum(len(r.blocks) for i, r in stage.regions.items() if i != LOCAL),
                page_bytes=self._page_bytes[index],
            )
            for index, stage in pages.mapped
        )
        leases = tuple(
            LeaseView(
                id=lease.lease_id,
                borrower=lease.borrower,
                lender=lease.lender,
                bytes=lease.nbytes,
                blocks=lease.blocks,
                state=lease.state.value,
                priority=lease.priority,
                age_seconds=round(self._clock() - lease.granted_s, 3),
            )
            for lease in self.lending.leases()
        )
        made = {} if self.homecoming is None else self.homecoming.decisions
        decisions = {choice.value: count for choice, count in made.items()}
        return OverflowView(stages, leases, self.lending.stats(), pages.moved_out, pages.moved_home, decisions)

    def _anticipate(self, now_s: float, waiting_blocks: int) -> None:
        pool = self.kv.pool
        self._demand.observe(now_s, pool.num_referenced, pool.limit, waiting_blocks)
        ahead = min(self._demand.blocks_to_borrow(), pool.num_blocks - pool.limit)
        if ahead > 0 and not any(loan.returning for loan in self._loans.values()):
            self.borrow(ahead)
            return
        borrowed = max((pages.backed - pages.local_pages for _, pages in self.kv.pages.mapped), default=0)
        unused = self._demand.blocks_to_return(borrowed) if borrowed > 0 else 0
        if unused:
            self._give_back(unused)

    def _leave_last_resort(self) -> None:
        """Where a device has room again, one region after the other comes out of main memory, at leisure."""
        if any(loan.region.closing for loan in self._loans.values()):
            return
        for loan in self._loans.values():
            if not self.lending.budget(loan.lease.lender).last_resort:
                continue
            offer = self.lending.largest_offer(loan.pages.site, self._page_bytes[loan.stage])
            if offer is None or self.lending.budget(offer[0]).last_resort or offer[1] < loan.lease.blocks:
                continue
            added = self._add_region(loan.stage, loan.pages, loan.lease.blocks)
            if added is not None:
                # the device that made the offer may have had no memory, and main memory been asked instead
                is_worse = self.lending.budget(added.lease.lender).last_resort or added.lease.blocks < loan.lease.blocks
                left = added if is_worse else loan
                left.returning = True
                self._close(left)
            return

    def _give_back(self, blocks: int) -> None:
        """Return regions that are not needed, youngest first, as long as the rest holds everything that is in use."""
        for _, pages in self.kv.pages.mapped:
            least = pages.backed - blocks
            for loan in sorted(self._loans.values(), key=lambda loan: -loan.lease.lease_id):
                if loan.pages is pages and not loan.region.closing:
                    loan.region.closing = True  # with the last one, the page that is spare goes too
                    loan.returning = loan.region.closing = pages.backed >= least
        self.kv.refresh_limit()

    def _reclaim(self, now_s: float) -> None:
        """Empty what lenders want back, as fast as the urgency says, and what was not needed, at leisure."""
        by_lease = {loan.lease.lease_id: loan for loan in self._loans.values()}
        due: dict[int, float] = {}
        for reclaim in self.lending.reclaims():
            due[reclaim.lease_id] = min(reclaim.deadline_s, due.get(reclaim.lease_id, reclaim.deadline_s))
        for lease_id, deadline_s in due.items():
            loan = by_lease[lease_id]
            self._close(loan)
            size = self._page_bytes[loan.stage]  # regions go back whole, however little of them is asked for
            nbytes = bytes_to_move(len(loan.region.blocks) * size, deadline_s - now_s, self._step_s)
            self._empty(loan, -(-nbytes // size))
        for loan in self._loans.values():
            if loan.returning:
                self._empty(loan, self._extent)
            elif loan.region.closing and loan.lease.state is not LeaseState.RECLAIMING and loan.last_step is None:
                loan.region.closing = False  # the lender no longer needs it
                self.kv.refresh_limit()

    def _close(self, loan: _Loan) -> None:
        """No block moves in any more; room for those that are there is made elsewhere, if it can be had."""
        if loan.region.closing:
            return
        loan.region.closing = True
        short = self.kv.pool.num_holding - self.kv.pages.backed(self.kv.pool.num_blocks)
        if short > 0 and not loan.returning:
            needed = self.kv.pool.num_referenced - self.kv.pages.backed(self.kv.pool.num_blocks)
            wanted = min(self.kv.pool.num_blocks, loan.pages.backed + max(short, needed))
            self._borrow_for(loan.stage, loan.pages, wanted)
        self.kv.refresh_limit()

    def _empty(self, loan: _Loan, blocks: int) -> None:
        """Move up to `blocks` blocks out of a region; what nobody uses is forgotten where there is no room for it."""
        for block in list(loan.region.blocks.values())[:blocks]:
            target = next(loan.pages.roomy(local=True), None)
            if target is not None:
                self.kv.pages.move(loan.stage, block, target.region_id)
            elif self.kv.pool.ref_count(block) == 0:
                self.kv.pool.evict(block)

    # -- regions whose blocks are gone ------------------------------------------------------------------------------

    def _release_empty(self) -> None:
        """While nothing is in flight and nothing waits to be moved, an empty region can go at once."""
        if self.kv.pages.has_ops or self.kv.in_flight:
            return
        empty = [loan for loan in self._loans.values() if loan.region.closing and not loan.region.blocks]
        if empty:
            self._drop(empty)
            self.view = self._look()

    def step_taken(self, step: int) -> None:
        """The moves gathered so far are part of this step."""
        for loan in self._loans.values():
            if loan.region.closing and not loan.region.blocks and loan.last_step is None:
                loan.last_step = step

    def step_done(self, step: int, moved: bool) -> None:
        """The step has passed all stages, and all before it."""
        self._drop([loan for loan in self._loans.values() if loan.last_step is not None and loan.last_step <= step])
        if not self.kv.in_flight:
            self.view = self._look()

    def _drop(self, loans: Iterable[_Loan]) -> None:
        for loan in loans:
            self._store.drop(loan.stage, loan.region_id)
            loan.pages.remove(loan.region_id)
            self.lending.release(loan.lease.lease_id)
            del self._loans[loan.region_id]
            logger.info("KV memory given back", borrower=loan.pages.site, lender=loan.lease.lender)

    def close(self) -> None:
        """The model is unloaded: regions are gone with their stages."""
        for loan in self._loans.values():
            self.lending.release(loan.lease.lease_id)
        self._loans.clear()

    def check_invariants(self) -> None:
        """Raise `AssertionError` unless every region has a lease of its size and every lease a region."""
        self.lending.check_invariants()
        leases = {lease.lease_id for lease in self.lending.leases()}
        if leases != {loan.lease.lease_id for loan in self._loans.values()}:
            raise AssertionError("a lease has no region, or a region no lease")
        regions = {(index, r) for index, pages in self.kv.pages.mapped for r in pages.regions if r != LOCAL}
        if regions != {(loan.stage, loan.region_id) for loan in self._loans.values()}:
            raise AssertionError("a region is on no loan, or a loan has no region")
        for loan in self._loans.values():
            size = (loan.region.num_pages, loan.region.num_pages * self._page_bytes[loan.stage])
            if size != (loan.lease.blocks, loan.lease.nbytes):
                raise AssertionError(f"region {loan.region_id} is {size}, its lease {loan.lease}")
