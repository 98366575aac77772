"""Whatever happens in whatever order: nothing is lent beyond ratio and limit, and what is needed comes back."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule
from lending.pools import Clock, gpu, host, make_pool

from core.lending import Lease, LeaseState, Urgency
from core.lending.reclaim import reclaim_order

BLOCK = 10
GPUS = ("a", "b", "c")
RATIO, THRESHOLD = 0.7, 0.8


class Lending(RuleBasedStateMachine):
    """Holds every lease it was given, and compares the pool with its own count."""

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.pool = make_pool(
            gpu("a"), gpu("b", limit=1800, total=2000), gpu("c", limit=450, total=500), host(600), clock=self.clock,
            lend_ratio=RATIO, reclaim_threshold=THRESHOLD,
        )  # fmt: skip
        self.held: dict[int, Lease] = {}
        self.grants = 0

    # -- what devices and the coordinator do

    @rule(
        device=st.sampled_from([*GPUS, "host"]),
        own=st.floats(0, 1.1),
        external=st.floats(0, 0.6),
        idle_s=st.floats(0, 9),
    )
    def observe(self, device: str, own: float, external: float, idle_s: float) -> None:
        total = self.pool.budget(device).total_bytes
        self.pool.observe(device, own_bytes=int(own * total), external_bytes=int(external * total), idle_s=idle_s)

    @rule(seconds=st.floats(0, 40))
    def wait(self, seconds: float) -> None:
        self.clock.now_s += seconds

    @rule(target=leases, borrower=st.sampled_from(GPUS), blocks=st.integers(1, 60), priority=st.integers(-1, 1))
    def borrow(self, borrower: str, blocks: int, priority: int) -> int | None:
        room = self.pool.offers(borrower, BLOCK)
        before = {name: self.pool.budget(name) for name in (*GPUS, "host")}
        lease = self.pool.borrow(borrower, blocks * BLOCK, blocks, priority)
        fitting = [name for name, units in room.items() if units >= blocks and name != "host"]
        on_host = set(room) == {"host"} and room["host"] >= blocks
        assert (lease is not None) == (bool(fitting) or on_host)
        if lease is None:
            return None
        assert lease.lender in (fitting or ["host"])
        budget, old = self.pool.budget(lease.lender), before[lease.lender]
        assert budget.lent_bytes == old.lent_bytes + blocks * BLOCK
        assert budget.shortfall_bytes == 0 and old.utilisation < THRESHOLD
        self.held[lease.lease_id] = lease
        self.grants += 1
        return lease.lease_id

    @rule(target=leases, borrower=st.sampled_from(GPUS), blocks=st.integers(1, 300))
    def borrow_at_most(self, borrower: str, blocks: int) -> int | None:
        offers = self.pool.offers(borrower, BLOCK)
        lease = self.pool.borrow_at_most(borrower, BLOCK, blocks)
        assert (lease is None) == (not offers)
        if lease is None:
            return None
        assert lease.blocks == min(blocks, next(iter(offers.values())))
        assert lease.nbytes == lease.blocks * BLOCK
        self.held[lease.lease_id] = lease
        self.grants += 1
        return lease.lease_id

    @rule(lease_id=leases)
    def activate(self, lease_id: int | None) -> None:
        lease = self.held.get(lease_id or 0)
        if lease is not None and lease.state is LeaseState.GRANTED:
            self.pool.activate(lease.lease_id)

    @rule(lease_id=consumes(leases))
    def release(self, lease_id: int | None) -> None:
        lease = self.held.pop(lease_id or 0, None)
        if lease is not None:
            before = self.pool.budget(lease.lender).lent_bytes
            self.pool.release(lease.lease_id)
            assert self.pool.budget(lease.lender).lent_bytes == before - lease.nbytes
            assert lease.state is LeaseState.RELEASED

    @rule(lease_id=leases, priority=st.integers(-1, 1))
    def prioritise(self, lease_id: int | None, priority: int) -> None:
        if lease_id in self.held:
            self.held[lease_id].priority = priority

    @rule(
        lender=st.sampled_from([*GPUS, "host"]),
        nbytes=st.one_of(st.none(), st.integers(0, 400)),
        urgency=st.sampled_from(Urgency),
    )
    def request(self, lender: str, nbytes: int | None, urgency: Urgency) -> None:
        promised = self.pool.request_reclaim(lender, nbytes, urgency)
        asked = sum(reclaim.nbytes for reclaim in self.pool.reclaims() if self.held[reclaim.lease_id].lender == lender)
        assert promised <= asked <= self.pool.budget(lender).lent_bytes

    @rule(lender=st.sampled_from([*GPUS, "host"]))
    def reopen(self, lender: str) -> None:
        self.pool.reopen(lender)

    @precondition(lambda self: self.held)
    @rule()
    def give_back_everything_that_is_asked_for(self) -> None:
        """What a coordinator does in the time it has; afterwards nobody needs anything."""
        for _ in range(100):
            reclaims = self.pool.reclaims()
            if not reclaims:
                break
            first = reclaims[0]
            assert first.urgency == max(reclaim.urgency for reclaim in reclaims)
            self.pool.release(self.held.pop(first.lease_id).lease_id)
        assert self.pool.reclaims() == []
        for name in (*GPUS, "host"):
            budget = self.pool.budget(name)
            assert budget.lent_bytes == 0 or (budget.shortfall_bytes == 0 and budget.utilisation < THRESHOLD)

    # -- what must be true whatever they did

    @invariant()
    def the_pool_is_sound(self) -> None:
        self.pool.check_invariants()

    @invariant()
    def every_lease_is_counted_once(self) -> None:
        assert {lease.lease_id for lease in self.pool.leases()} == set(self.held)
        for name in (*GPUS, "host"):
            lent = sum(lease.nbytes for lease in self.held.values() if lease.lender == name)
            budget = self.pool.budget(name)
            assert budget.lent_bytes == lent
            assert lent <= (budget.limit_bytes if name == "host" else RATIO * budget.total_bytes)
        stats = self.pool.stats()
        assert sum(stats.borrows.values()) == self.grants
        assert stats.active_leases == len(self.held)
        assert self.pool.lent_bytes() <= stats.bytes_lent_total

    @invariant()
    def what_is_over_a_limit_is_under_reclaim(self) -> None:
        reclaims = self.pool.reclaims()
        for name in (*GPUS, "host"):
            budget = self.pool.budget(name)
            asked = sum(reclaim.nbytes for reclaim in reclaims if self.held[reclaim.lease_id].lender == name)
            assert asked >= min(budget.shortfall_bytes, budget.lent_bytes)
            if budget.utilisation >= THRESHOLD:
                assert asked == budget.lent_bytes

    @invariant()
    def low_priority_and_young_leases_go_first(self) -> None:
        """Those under reclaim come before those that are not, and only the last of them may be left with a part."""
        self.pool.reclaims()
        for name in (*GPUS, "host"):
            ordered = reclaim_order(lease for lease in self.held.values() if lease.lender == name)
            wanted = [lease for lease in ordered if lease.state is LeaseState.RECLAIMING]
            assert wanted == ordered[: len(wanted)]
            assert all(lease.reclaim_bytes == lease.nbytes for lease in wanted[:-1])
            assert [(lease.priority, -lease.lease_id) for lease in ordered] == sorted(
                (lease.priority, -lease.lease_id) for lease in ordered
            )

    @invariant()
    def a_deadline_is_never_later_than_announced(self) -> None:
        for reclaim in self.pool.reclaims():
            assert reclaim.deadline_s <= self.clock.now_s + reclaim.urgency.bound_s
            lease = self.held[reclaim.lease_id]
            assert lease.urgency is not None and lease.urgency >= reclaim.urgency
            assert lease.deadline_s is not None and lease.deadline_s <= reclaim.deadline_s


TestLending = Lending.TestCase
TestLending.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
