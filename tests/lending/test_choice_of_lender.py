"""Who lends: the score, the room, main memory last."""

from __future__ import annotations

import pytest
from lending.pools import Clock, gpu, host, make_pool, take, use

from core.costs import LinkProfile, LinkTopology
from core.lending import GPUBudget, LeaseState
from core.lending.score import Candidate, scores

EQUAL = {"lendable_bytes": 100, "transfer_s": 1.0, "idle_s": 5.0}
BETTER = {"lendable_bytes": 200, "transfer_s": 0.5, "idle_s": 10.0}
WEIGHT = {"lendable_bytes": 0.40, "transfer_s": 0.30, "idle_s": 0.30}


@pytest.mark.parametrize("name", WEIGHT)
def test_each_input_alone_decides_with_its_weight(name: str) -> None:
    plain, better = Candidate("plain", **EQUAL), Candidate("better", **{**EQUAL, name: BETTER[name]})  # type: ignore[arg-type]
    rated = scores([plain, better])
    assert rated["better"] == pytest.approx(1.0)
    assert rated["plain"] == pytest.approx(1.0 - WEIGHT[name] / 2)  # half as good in one of three


@pytest.mark.parametrize(("one", "other"), [("lendable_bytes", "transfer_s"), ("lendable_bytes", "idle_s")])
def test_free_capacity_weighs_more_than_either_of_the_others(one: str, other: str) -> None:
    first = Candidate("first", **{**EQUAL, one: BETTER[one]})  # type: ignore[arg-type]
    second = Candidate("second", **{**EQUAL, other: BETTER[other]})  # type: ignore[arg-type]
    rated = scores([first, second])
    assert rated["first"] - rated["second"] == pytest.approx(0.05)


def test_scores_at_the_edges() -> None:
    assert scores([]) == {}
    free = Candidate("free", 10, 0.0, 0.0)  # a link that costs nothing, and no one has been idle
    assert scores([free]) == {"free": pytest.approx(0.7)}
    rated = scores([free, Candidate("far", 10, 2.0, 0.0)])
    assert rated == {"free": pytest.approx(0.7), "far": pytest.approx(0.4)}


def test_the_pool_measures_all_three() -> None:
    slow = LinkProfile(100.0)
    for budgets, links in (
        ((gpu("b"), gpu("x"), gpu("y", limit=2000)), LinkTopology()),
        ((gpu("b"), gpu("x"), gpu("y", idle_s=3.0)), LinkTopology()),
        ((gpu("b"), gpu("x"), gpu("y")), LinkTopology({("b", "x"): slow})),
        ((gpu("b"), gpu("x"), gpu("y")), LinkTopology({("x", "b"): slow})),  # the way home counts as well
    ):
        pool = make_pool(*budgets, links=links)
        assert pool.lenders("b", 100) == ("y", "x")
        lease = pool.borrow("b", 100, 10)
        assert lease is not None and lease.lender == "y"


def test_only_devices_of_the_same_machine_lend() -> None:
    """Main memory, too, is that of each machine."""
    other_host = GPUBudget("desk/host", 1000, 1000, last_resort=True)
    pool = make_pool(gpu("a"), gpu("b"), gpu("desk/a"), gpu("desk/b"), gpu("attic/a", limit=9000), host(), other_host)
    assert pool.lenders("desk/a", 100) == ("desk/b", "desk/host")
    assert pool.lenders("a", 100) == ("b", "host")
    assert pool.lenders("attic/a", 100) == ()
    assert pool.offers("desk/a", 100) == {"desk/b": 7, "desk/host": 10}
    taken = [pool.borrow("desk/a", 100, 1) for _ in range(17)]
    assert [lease.lender for lease in taken if lease is not None] == ["desk/b"] * 7 + ["desk/host"] * 10
    pool.check_invariants()


def test_devices_of_other_machines_lend_to_whom_they_may() -> None:
    """Behind those of the same machine, before its main memory; and never their own main memory."""
    other_host = GPUBudget("desk/host", 1000, 1000, last_resort=True)
    far = {("a", "desk/a"), ("a", "desk/host"), ("desk/a", "b")}
    pool = make_pool(gpu("a"), gpu("b", limit=200), gpu("desk/a", limit=9000), host(), other_host, far=far)
    assert pool.lenders("a", 100) == ("b", "desk/a", "host")
    assert pool.lenders("b", 100) == ("a", "host")
    assert pool.lenders("desk/a", 100) == ("b", "desk/host")
    assert pool.offers("a", 100) == {"b": 1, "desk/a": 63, "host": 10}
    assert pool.borrow("a", 200, 2) is None, "what is beside it goes first, as little as it is"
    near, *others = (pool.borrow_at_most("a", 100, 40) for _ in range(4))
    assert near is not None and (near.lender, near.blocks) == ("b", 1)
    taken = [(lease.lender, lease.blocks) for lease in others if lease is not None]
    assert taken == [("desk/a", 40), ("desk/a", 23), ("host", 10)]
    assert pool.lenders("desk/a", 100) == ("desk/host",), "not to its own lender, nor is there room elsewhere"
    pool.check_invariants()


def test_links_inside_a_machine_are_those_that_copies_take() -> None:
    hop, copy = LinkProfile(100.0), LinkProfile(1000.0)
    ways = {("m/b", "m/x"): hop, ("m/x", "m/b"): hop, ("m/b", "m/y"): hop, ("m/y", "m/b"): hop}
    inside = {("m/b", "m/y"): copy, ("m/y", "m/b"): copy}
    assert (
        LinkTopology(ways).copying("m/b", "m/x") == hop
        and LinkTopology(ways, inside=inside).link(*next(iter(inside))) == hop
    )
    assert make_pool(gpu("m/b"), gpu("m/x"), gpu("m/y"), links=LinkTopology(ways)).lenders("m/b", 100) == ("m/x", "m/y")
    pool = make_pool(gpu("m/b"), gpu("m/x"), gpu("m/y"), links=LinkTopology(ways, inside=inside))
    assert pool.lenders("m/b", 100) == ("m/y", "m/x")


def test_the_score_follows_what_is_observed_and_lent() -> None:
    pool = make_pool(gpu("b"), gpu("x"), gpu("y"))
    assert pool.lenders("b", 100) == ("x", "y"), "ties go by the order given"
    take(pool, "b", 100)
    assert pool.lenders("b", 100) == ("y", "x")
    use(pool, "y", own=500)
    assert pool.lenders("b", 100) == ("x", "y")
    use(pool, "y", own=500, idle_s=9.0)
    assert pool.lenders("b", 100) == ("y", "x")


def test_a_device_does_not_lend_to_itself_or_to_its_own_lender() -> None:
    pool = make_pool(gpu("a"), gpu("b"))
    lease = take(pool, "b", 100)
    assert pool.lenders("b", 10) == ("a",)
    assert pool.lenders("a", 10) == ()
    assert pool.borrow("a", 10, 1) is None
    pool.release(lease)
    assert pool.lenders("a", 10) == ("b",)


def test_all_or_nothing_and_at_most() -> None:
    pool = make_pool(gpu("b"), gpu("x", own=700), gpu("y", own=500))
    assert pool.borrow("b", 510, 51) is None
    assert list(pool.offers("b", 40).items()) == [("y", 12), ("x", 7)]
    assert pool.largest_offer("b", 40) == ("y", 12)
    assert pool.largest_offer("b", 501) is None
    lease = pool.borrow_at_most("b", 40, 20)
    assert lease is not None and (lease.lender, lease.blocks, lease.nbytes) == ("y", 12, 480)
    whole = pool.borrow_at_most("b", 40, 5)
    assert whole is not None and (whole.lender, whole.blocks) == ("x", 5)
    assert pool.borrow_at_most("b", 301, 1) is None
    pool.check_invariants()


def test_a_grant_says_everything_about_itself() -> None:
    clock = Clock()
    pool = make_pool(gpu("a"), gpu("b"), clock=clock)
    clock.now_s = 123.0
    lease = pool.borrow("b", 120, 12, priority=-1)
    assert lease is not None
    assert (lease.borrower, lease.lender, lease.nbytes, lease.blocks) == ("b", "a", 120, 12)
    assert (lease.priority, lease.granted_s, lease.state) == (-1, 123.0, LeaseState.GRANTED)
    assert pool.lease(lease.lease_id) is lease
    pool.activate(lease.lease_id)
    assert lease.state is LeaseState.ACTIVE
    with pytest.raises(ValueError, match="is active, no block may move in"):
        pool.activate(lease.lease_id)


def test_the_ratio_bounds_what_is_lent_in_all() -> None:
    pool = make_pool(gpu("a"), gpu("b"), gpu("c"), lend_ratio=0.5)
    use(pool, "c", own=900)
    take(pool, "b", 300)
    take(pool, "c", 500)  # from b, which has not lent yet
    assert {lease.lender for lease in pool.leases(borrower="c")} == {"b"}
    use(pool, "b", own=900)
    assert pool.borrow("c", 210, 21) is None
    assert pool.borrow("c", 200, 20) is not None  # a: 300 + 200
    assert pool.offers("c", 1) == {}


# -- main memory -------------------------------------------------------------------------------------------------------


def test_main_memory_lends_only_when_no_gpu_has_room_for_a_block() -> None:
    pool = make_pool(host(5000), gpu("a", own=790), gpu("b"))
    assert pool.lenders("b", 100) == ("a", "host")
    assert pool.borrow("b", 400, 10) is None, "a has room for five blocks: take those first"
    first = pool.borrow_at_most("b", 40, 10)
    assert first is not None and (first.lender, first.blocks) == ("a", 5)
    second = pool.borrow_at_most("b", 40, 10)
    assert second is not None and (second.lender, second.blocks) == ("host", 10)
    assert pool.lenders("b", 10) == ("a", "host"), "there is room for smaller blocks"
    assert pool.largest_offer("b", 40) == ("host", 115)
    pool.check_invariants()


def test_main_memory_lends_all_of_its_limit_and_no_more() -> None:
    pool = make_pool(gpu("b"), host(500))
    take(pool, "b", 500)
    assert pool.borrow("b", 10, 1) is None
    assert pool.offers("b", 1) == {}


def test_main_memory_takes_what_a_lender_reclaims() -> None:
    pool = make_pool(gpu("a"), gpu("b"), host())
    lease = take(pool, "b", 600)
    use(pool, "a", own=900)
    assert pool.lenders("b", 10) == ("host",)
    moved = take(pool, "b", 600)
    pool.release(lease)
    assert pool.lease(moved).lender == "host"
    pool.check_invariants()


def test_main_memory_gives_back_like_any_lender() -> None:
    pool = make_pool(gpu("b"), host())
    lease = take(pool, "b", 600)
    use(pool, "host", own=0, external=500)
    assert [(reclaim.lease_id, reclaim.nbytes) for reclaim in pool.reclaims()] == [(lease, 100)]


def test_main_memory_does_not_borrow() -> None:
    pool = make_pool(gpu("b"), host())
    with pytest.raises(ValueError, match="does not borrow"):
        pool.borrow("host", 10, 1)


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nbytes", "blocks"), [(0, 0), (10, 0), (0, 1), (3, 4), (-10, -1)])
def test_a_lease_without_bytes_or_blocks_is_refused(nbytes: int, blocks: int) -> None:
    with pytest.raises(ValueError, match="cannot borrow"):
        make_pool(gpu("a"), gpu("b")).borrow("b", nbytes, blocks)


def test_what_is_unknown_is_refused_by_name() -> None:
    pool = make_pool(gpu("a"), gpu("b"))
    for act in (
        lambda: pool.borrow("c", 10, 1),
        lambda: use(pool, "c", own=1),
        lambda: pool.budget("c"),
    ):
        with pytest.raises(ValueError, match="unknown device 'c', there are a, b"):
            act()
    with pytest.raises(ValueError, match="there is no lease 7"):
        pool.release(7)
    with pytest.raises(ValueError, match="pages of 0 bytes"):
        pool.offers("b", 0)


@pytest.mark.parametrize(("ratio", "threshold"), [(-0.1, 0.8), (1.1, 0.8), (0.7, 0.0), (0.7, 1.1)])
def test_shares_out_of_range_are_refused(ratio: float, threshold: float) -> None:
    with pytest.raises(ValueError, match="lend ratio"):
        make_pool(gpu("a"), lend_ratio=ratio, reclaim_threshold=threshold)


def test_a_pool_starts_with_one_of_each_and_nothing_lent() -> None:
    with pytest.raises(ValueError, match="a is there twice"):
        make_pool(gpu("a"), gpu("a"))
