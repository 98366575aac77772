"""What lenders need back: how much, how soon, and from whom."""

from __future__ import annotations

from dataclasses import replace

import pytest
from lending.pools import Clock, gpu, host, make_pool, take, use

from core.lending import GPUBudget, LeaseState, Urgency, VRAMLendingPool
from core.lending.reclaim import Cause, pressures

LOW, MEDIUM, HIGH, CRITICAL = Urgency
CARD = GPUBudget("a", limit_bytes=900, total_bytes=1000, lent_bytes=100)


def urgency_of(budget: GPUBudget, threshold: float) -> Urgency | None:
    """How urgently a lender needs memory back, all in all."""
    return max((urgency for _, urgency in pressures(budget, threshold).values()), default=None)


@pytest.mark.parametrize(
    ("own", "external", "lent", "expected"),
    [
        (500, 299, 100, None),
        (500, 300, 100, LOW),
        (799, 100, 0, None),  # nothing is lent, so nothing can come back
        (899, 0, 1, LOW),
        (900, 0, 0, None),
        (701, 100, 100, HIGH),  # one over the limit
        (800, 100, 100, HIGH),  # all of the margin
        (800, 101, 100, CRITICAL),
        (300, 0, 601, HIGH),
        (300, 0, 701, CRITICAL),
    ],
)
def test_urgency_by_how_far_over(own: int, external: int, lent: int, expected: Urgency | None) -> None:
    assert urgency_of(replace(CARD, own_bytes=own, external_bytes=external, lent_bytes=lent), 0.8) == expected


@pytest.mark.parametrize(("own", "threshold", "expected"), [(899, 0.8, LOW), (900, 0.8, MEDIUM), (749, 0.5, LOW)])
def test_the_middle_between_threshold_and_all_is_medium(own: int, threshold: float, expected: Urgency) -> None:
    whole = GPUBudget("a", 1000, 1000, own_bytes=own, lent_bytes=100)
    assert urgency_of(whole, threshold) == expected
    assert urgency_of(replace(whole, own_bytes=750), 0.5) == MEDIUM


def asked(pool: VRAMLendingPool) -> list[tuple[int, int, Urgency]]:
    pool.check_invariants()
    return [(reclaim.lease_id, reclaim.nbytes, reclaim.urgency) for reclaim in pool.reclaims()]


def asked_why(pool: VRAMLendingPool) -> list[tuple[int, int, Cause]]:
    pool.check_invariants()
    return [(reclaim.lease_id, reclaim.nbytes, reclaim.cause) for reclaim in pool.reclaims()]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pool(clock: Clock) -> VRAMLendingPool:
    """a has a margin of 100 bytes, lends to b; nobody else lends before main memory."""
    return make_pool(gpu("a", limit=900, total=1000), gpu("b"), host(), clock=clock)


def test_at_the_threshold_everything_is_asked_back_and_nothing_lent(pool: VRAMLendingPool) -> None:
    first, second = take(pool, "b", 200), take(pool, "b", 100)
    use(pool, "a", own=599)
    assert asked(pool) == []
    use(pool, "a", own=600, external=200)  # 1100 of 900: over the total as well
    assert asked(pool) == [(second, 100, CRITICAL), (first, 100, CRITICAL), (first, 100, LOW)]
    assert pool.lenders("b", 10) == ("host",)
    assert {reclaim.cause for reclaim in pool.reclaims()} == {Cause.SHORTFALL, Cause.THRESHOLD}


def test_a_shortfall_takes_no_more_than_it_needs(pool: VRAMLendingPool) -> None:
    rest, lease = take(pool, "b", 260), take(pool, "b", 40)
    use(pool, "a", own=630)
    assert asked(pool) == [(lease, 30, HIGH)]
    held = pool.lease(lease)
    assert (held.state, held.reclaim_bytes, held.urgency) == (LeaseState.RECLAIMING, 30, HIGH)
    use(pool, "a", own=650)
    assert asked(pool) == [(lease, 40, HIGH), (rest, 10, HIGH)]
    pool.release(lease)
    assert asked(pool) == [(rest, 10, HIGH)]
    use(pool, "a", own=640)
    assert asked(pool) == [] and pool.lease(rest).state is LeaseState.ACTIVE


def test_low_priority_goes_first_then_the_youngest(pool: VRAMLendingPool, clock: Clock) -> None:
    leases = []
    for priority in (5, 1, 5, 1):
        clock.now_s += 1
        leases.append(take(pool, "b", 100, priority))
    use(pool, "a", own=610)
    assert [lease for lease, _, _ in asked(pool)] == [leases[3], leases[1]]
    use(pool, "a", own=750)
    assert asked(pool) == [
        (leases[3], 100, CRITICAL),
        (leases[1], 100, CRITICAL),
        (leases[2], 50, CRITICAL),
    ]
    pool.lease(leases[0]).priority = 0  # its blocks are of no use to anybody any more
    assert [lease for lease, _, _ in asked(pool)] == [leases[0], leases[3], leases[1]]
    assert pool.lease(leases[2]).state is LeaseState.ACTIVE


def test_leases_of_the_same_moment_go_by_number(pool: VRAMLendingPool) -> None:
    first, second = take(pool, "b", 100), take(pool, "b", 100)
    pool.request_reclaim("a", 150, LOW)
    assert asked(pool) == [(second, 100, LOW), (first, 50, LOW)]


def test_a_lease_of_whatever_there_was_is_as_important_as_any_other(pool: VRAMLendingPool, clock: Clock) -> None:
    """Nobody said how important: the older one stays, as between two that were borrowed alike."""
    older = pool.borrow_at_most("b", 10, 10)
    clock.now_s += 1
    younger = pool.borrow("b", 100, 10)
    assert older is not None and younger is not None
    pool.request_reclaim("a", 50, LOW)
    assert asked(pool) == [(younger.lease_id, 50, LOW)]


def test_deadlines_are_announced_once_and_only_move_forward(pool: VRAMLendingPool, clock: Clock) -> None:
    lease = take(pool, "b", 50)
    for passed_s, own, urgency, deadline_s in (
        (0, 800, LOW, 130.0),
        (10, 820, LOW, 130.0),
        (1, 900, HIGH, 112.0),  # MEDIUM by the threshold, HIGH by the shortfall
        (0.5, 880, HIGH, 112.0),
    ):
        clock.now_s += passed_s
        use(pool, "a", own=own)
        assert (pool.lease(lease).urgency, pool.lease(lease).deadline_s) == (urgency, deadline_s)
    use(pool, "a", own=100)
    assert pool.lease(lease).deadline_s is None
    clock.now_s += 10
    use(pool, "a", own=850)
    assert pool.lease(lease).deadline_s == clock.now_s + 30, "the old need is over, this is another"


def test_more_urgency_does_not_put_off_what_was_announced(pool: VRAMLendingPool, clock: Clock) -> None:
    lease = take(pool, "b", 10)
    use(pool, "a", own=800)
    clock.now_s += 28
    use(pool, "a", own=850, external=50)  # 5 s from now would be later than the 30 s from before
    assert [(reclaim.cause, reclaim.urgency, reclaim.deadline_s) for reclaim in pool.reclaims()] == [
        (Cause.SHORTFALL, HIGH, 129.0),
    ]
    use(pool, "a", own=890)
    assert [(reclaim.cause, reclaim.deadline_s) for reclaim in pool.reclaims()] == [(Cause.THRESHOLD, 130.0)]
    assert pool.lease(lease).deadline_s == 130.0


def test_a_change_of_priorities_does_not_put_the_deadline_off(pool: VRAMLendingPool, clock: Clock) -> None:
    first, second = take(pool, "b", 100), take(pool, "b", 100)
    pool.request_reclaim("a", 50, MEDIUM)
    clock.now_s += 3
    pool.lease(first).priority = -1
    assert [(reclaim.lease_id, reclaim.deadline_s) for reclaim in pool.reclaims()] == [(first, 105.0)]
    assert pool.lease(second).state is LeaseState.ACTIVE


def test_a_need_that_goes_away_calls_the_reclaim_off(pool: VRAMLendingPool) -> None:
    lease = take(pool, "b", 100)
    unused = pool.borrow("b", 100, 10)
    assert unused is not None
    use(pool, "a", own=650, external=250)
    assert pool.lease(lease).state is unused.state is LeaseState.RECLAIMING
    with pytest.raises(ValueError, match="no block may move in"):
        pool.activate(unused.lease_id)
    use(pool, "a", own=100)
    assert (pool.lease(lease).state, unused.state) == (LeaseState.ACTIVE, LeaseState.GRANTED)
    pool.activate(unused.lease_id)
    assert asked(pool) == []


def test_a_need_that_hovers_at_the_threshold_does_not_flap(pool: VRAMLendingPool) -> None:
    use(pool, "a", own=800)
    for own in (799, 770, 760):
        use(pool, "a", own=own)
        assert pool.lenders("b", 10) == ("host",)
    use(pool, "a", own=759)
    assert pool.lenders("b", 10) == ("a", "host")
    use(pool, "a", own=799)
    assert pool.lenders("b", 10) == ("a", "host")


# -- requests ----------------------------------------------------------------------------------------------------------


def test_a_request_is_met_by_what_comes_back(pool: VRAMLendingPool) -> None:
    first, small, second = take(pool, "b", 90), take(pool, "b", 10), take(pool, "b", 100)
    assert pool.request_reclaim("a", 120, MEDIUM) == 120
    assert asked(pool) == [(second, 100, MEDIUM), (small, 10, MEDIUM), (first, 10, MEDIUM)]
    assert pool.lenders("b", 10) == ("host",)
    pool.release(second)
    assert asked(pool) == [(small, 10, MEDIUM), (first, 10, MEDIUM)]
    pool.release(small)
    assert asked(pool) == [(first, 10, MEDIUM)]
    pool.release(first)
    assert asked(pool) == []


def test_bytes_that_were_asked_for_are_not_lent_to_the_next(pool: VRAMLendingPool) -> None:
    lease = take(pool, "b", 100)
    pool.request_reclaim("a", 100, CRITICAL)
    pool.release(lease)
    assert pool.lenders("b", 10) == ("host",)
    use(pool, "a", own=100)
    assert pool.lenders("b", 10) == ("a", "host")


def test_what_is_over_the_limit_is_covered_before_requests(pool: VRAMLendingPool) -> None:
    rest, lease = take(pool, "b", 260), take(pool, "b", 40)
    use(pool, "a", own=630)
    pool.request_reclaim("a", 50, LOW)
    assert asked(pool) == [(lease, 30, HIGH), (lease, 10, LOW), (rest, 40, LOW)]
    assert (pool.lease(lease).reclaim_bytes, pool.lease(lease).urgency) == (40, HIGH)
    pool.release(lease)
    assert asked(pool) == [(rest, 40, LOW)]


def test_the_most_urgent_request_is_met_first(pool: VRAMLendingPool) -> None:
    rest, lease = take(pool, "b", 230), take(pool, "b", 70)
    pool.request_reclaim("a", 50, LOW)
    pool.request_reclaim("a", 60, HIGH)
    assert asked(pool) == [(lease, 60, HIGH), (lease, 10, LOW), (rest, 40, LOW)]
    pool.release(lease)
    assert asked(pool) == [(rest, 40, LOW)]


def test_a_request_gets_what_is_lent_and_not_asked_for(pool: VRAMLendingPool) -> None:
    assert pool.request_reclaim("a", 100, HIGH) == 0
    assert pool.lenders("b", 10) == ("a", "host"), "it has its memory already"
    take(pool, "b", 300)
    assert pool.request_reclaim("a", 250, LOW) == 250
    assert pool.request_reclaim("a", 250, HIGH) == 50
    assert pool.request_reclaim("a", 250, HIGH) == 0
    assert pool.request_reclaim("a", None, HIGH) == 0
    with pytest.raises(ValueError, match="-1 bytes"):
        pool.request_reclaim("a", -1, LOW)


def test_a_request_is_cut_to_what_is_lent_beyond_the_shortfall(pool: VRAMLendingPool) -> None:
    lease = take(pool, "b", 300)
    pool.request_reclaim("a", 290, LOW)
    use(pool, "a", own=640)
    assert [(nbytes, cause) for _, nbytes, cause in asked_why(pool)] == [
        (40, Cause.SHORTFALL),
        (260, Cause.REQUEST),
    ]
    pool.release(lease)
    assert asked(pool) == []
    assert pool.lenders("b", 10) == ("host",), "what was asked for came back, and a has not said what it does with it"
    use(pool, "a", own=500)
    assert pool.lenders("b", 10) == ("a", "host"), "it does not wait for bytes that nobody holds"


def test_a_withdrawal_lasts_until_the_device_is_opened_again(pool: VRAMLendingPool) -> None:
    lease = take(pool, "b", 100)
    assert pool.request_reclaim("a", None, MEDIUM) == 100
    assert asked(pool) == [(lease, 100, MEDIUM)]
    pool.request_reclaim("a", None, LOW)
    pool.request_reclaim("a", None, CRITICAL)
    assert asked(pool) == [(lease, 100, CRITICAL)]
    pool.release(lease)
    use(pool, "a", own=0)
    assert pool.lenders("b", 10) == ("host",)
    pool.reopen("a")
    assert pool.lenders("b", 10) == ("a", "host")


def test_opening_again_calls_the_withdrawal_off(pool: VRAMLendingPool) -> None:
    lease = take(pool, "b", 100)
    pool.request_reclaim("a", None, MEDIUM)
    pool.reopen("a")
    assert asked(pool) == []
    assert pool.lease(lease).state is LeaseState.ACTIVE


def test_the_most_urgent_of_all_lenders_comes_first() -> None:
    pool = make_pool(gpu("b"), gpu("x"), gpu("y"))
    use(pool, "y", own=500)
    on_x, use_y = take(pool, "b", 700), take(pool, "b", 200)
    pool.request_reclaim("x", 10, LOW)
    pool.request_reclaim("y", 10, HIGH)
    assert asked(pool) == [(use_y, 10, HIGH), (on_x, 10, LOW)]


# -- release -----------------------------------------------------------------------------------------------------------


def test_release_frees_exactly_what_was_lent(pool: VRAMLendingPool) -> None:
    before = pool.budget("a")
    lease = take(pool, "b", 300)
    assert pool.budget("a").lent_bytes == pool.lent_bytes() == 300
    held = pool.lease(lease)
    pool.release(lease)
    assert pool.budget("a") == before
    assert held.state is LeaseState.RELEASED
    assert pool.leases() == ()
    with pytest.raises(ValueError, match=f"there is no lease {lease}"):
        pool.release(lease)


def test_a_lease_under_reclaim_is_released(pool: VRAMLendingPool) -> None:
    lease = take(pool, "b", 300)
    use(pool, "a", own=950)
    assert pool.lease(lease).state is LeaseState.RECLAIMING
    pool.release(lease)
    assert pool.leases() == () and asked(pool) == []


# -- statistics --------------------------------------------------------------------------------------------------------


def test_statistics_count_what_happened(pool: VRAMLendingPool) -> None:
    assert pool.capacity_bytes() == 700 + 700 + 1000
    first = take(pool, "b", 300)
    take(pool, "b", 100)
    pool.request_reclaim("a", 50, LOW)
    stats = pool.stats()
    assert stats.borrows == {("b", "a"): 2}
    assert stats.reclaims == {LOW: 1, MEDIUM: 0, HIGH: 0, CRITICAL: 0}
    assert (stats.bytes_lent_total, pool.lent_bytes(), stats.active_leases) == (400, 400, 2)
    assert stats.capacity_bytes == 350 + 700 + 1000, "a lends no more for now, and 50 of its 400 bytes go home"
    pool.release(first)
    use(pool, "a", own=850)
    use(pool, "a", own=860)
    later = pool.stats()
    assert (later.bytes_lent_total, pool.lent_bytes(), later.active_leases) == (400, 100, 1)
    assert later.reclaims == {LOW: 2, MEDIUM: 0, HIGH: 1, CRITICAL: 0}
    use(pool, "a", own=950)
    assert pool.stats().reclaims == {LOW: 2, MEDIUM: 1, HIGH: 1, CRITICAL: 1}
    assert stats.active_leases == 2, "a snapshot stays"


def test_an_audit_finds_what_is_wrong(pool: VRAMLendingPool) -> None:
    lease = pool.lease(take(pool, "b", 300))
    for attribute, wrong in (("nbytes", 290), ("borrower", "a"), ("blocks", 0), ("state", LeaseState.RELEASED)):
        right = getattr(lease, attribute)
        setattr(lease, attribute, wrong)
        with pytest.raises(AssertionError):
            pool.check_invariants()
        setattr(lease, attribute, right)
    pool.check_invariants()
