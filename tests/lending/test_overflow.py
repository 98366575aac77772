"""Lent memory: borrowed before it is short, and back in time when its lender wants it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from overflow_cases import BLOCK, PAGE, Chaos, Rig, gpu, host, lenders, run_chaos

from core.kv_cache.page_ops import LOCAL
from core.lending import Choice, LeaseState, Urgency
from core.lending.overflow import KVOverflow
from core.lending.pool import REFUSED_S

LOW, MEDIUM, HIGH, CRITICAL = Urgency
HOLD_S = 10.0


# -- borrowing --------------------------------------------------------------------------------------------------------


def test_a_stage_that_lacks_pages_borrows_extent_by_extent() -> None:
    rig = Rig((8, 20))
    rig.fill(20)
    assert rig.store.asked == [("x", 9), ("x", 8)], "with the first, a page for blocks to change places through"
    assert [lease.state for lease in rig.leases("x")] == [LeaseState.ACTIVE] * 2
    assert (rig.kv.pool.limit, rig.lent("x")) == (20, 17 * PAGE), "the other stage has 20 pages"
    rig.fill(4)
    assert rig.store.asked[2:] == [("x", 9)], "for the other stage; the first had room for four blocks more"
    assert (rig.kv.pool.limit, rig.lent("x")) == (24, 17 * PAGE + 9 * 2 * PAGE)
    rig.check()
    rig.check_contents()


def test_lenders_that_have_little_give_what_they_have_and_main_memory_comes_last() -> None:
    rig = Rig(budgets=[gpu("x", own=800), gpu("y", own=980), host()])
    rig.fill(12)
    assert {name for name, _ in rig.store.asked} == {"host"}, "GPUs over the threshold lend nothing"
    rig = Rig(budgets=[gpu("x", 40), gpu("y", 30), host()])
    rig.fill(12)
    assert rig.store.asked == [("x", 2), ("y", 2), ("host", 8)]
    rig.check_contents()


def test_blocks_go_to_gpus_before_they_go_to_main_memory() -> None:
    rig = Rig(budgets=[gpu("x", own=800), host()])
    rig.overflow.borrow(8)
    rig.pool.observe("x", own_bytes=0, external_bytes=0, idle_s=0)
    rig.overflow.borrow(8)
    assert [name for name, _ in rig.store.asked] == ["host", "x"]
    rig.fill(12)
    assert rig.away()[1] == [] and len(rig.away()[2]) >= 4


def test_main_memory_is_left_when_a_gpu_has_room_again() -> None:
    rig = Rig(blocks=24, budgets=[gpu("x", own=800), host()])
    rig.fill(24)
    assert {lease.lender for lease in rig.leases()} == {"host"}
    rig.uses("x")
    rig.rounds(3)
    assert {lease.lender for lease in rig.leases()} == {"x"}
    rig.check_contents()


def test_a_lender_that_has_no_memory_after_all_leaves_nothing_behind_and_the_next_one_is_asked() -> None:
    rig = Rig()
    rig.store.refusing = {"x", "y"}
    seq_id = rig.fill(8)
    rig.live[seq_id].tokens += [0, 0]
    assert rig.extend(seq_id, BLOCK) is None
    assert [name for name, _ in rig.store.asked] == ["x", "y"]
    assert (rig.leases(), rig.store.regions, rig.away(), rig.kv.pool.limit) == ([], {}, {}, 8)
    rig.check()
    rig.store.refusing = {"x"}
    rig.clock.now_s += REFUSED_S
    rig.tick()
    assert rig.extend(seq_id, BLOCK) is not None, "the next one has some"
    assert [lease.lender for lease in rig.leases()] == ["y"]
    rig.check()


def test_main_memory_is_not_left_for_more_of_it() -> None:
    """The device that made an offer has no memory after all."""
    rig = Rig(blocks=24, budgets=[gpu("x", own=800), host()])
    rig.fill(24)
    held = set(rig.away())
    rig.store.refusing = {"x"}
    rig.uses("x")
    rig.rounds(3)
    assert held <= set(rig.away()) and {lease.lender for lease in rig.leases()} == {"host"}
    rig.check_contents()


def test_a_lender_that_had_no_memory_is_asked_again_after_a_while() -> None:
    rig = Rig()
    rig.store.refusing = {"x", "y"}
    for _ in range(10):
        rig.overflow.borrow(8)
    assert [name for name, _ in rig.store.asked] == ["x", "y"]
    rig.store.refusing = set()
    rig.clock.now_s += REFUSED_S
    rig.overflow.borrow(8)
    assert [lease.lender for lease in rig.leases()] == ["x"]


# -- memory that is wanted back ---------------------------------------------------------------------------------------


def loaded(depth: int, extent: int = 32) -> Rig:
    """All 72 blocks are in use, 64 of them at x; y has room for them."""
    rig = Rig(blocks=72, extent=extent, depth=depth)
    for _ in range(3):
        rig.fill(24)
    rig.rounds(0.5)
    assert rig.kv.pool.num_referenced == 72 and sum(map(len, rig.away().values())) == 64
    assert rig.lent("x") >= 64 * PAGE and rig.lent("y") == 0
    return rig


def ask(rig: Rig, urgency: Urgency, way: str) -> int:
    """x wants memory back; how much of it may still be lent when the bound is over."""
    lent = rig.lent("x")
    if way == "all":
        assert rig.pool.request_reclaim("x", lent, urgency) == lent
        return 0
    if way == "a page":
        assert rig.pool.request_reclaim("x", PAGE, urgency) == PAGE
        return lent - PAGE
    own, external = {LOW: (8000, 0), MEDIUM: (5000, 4000), HIGH: (9200, 0), CRITICAL: (500, 9000)}[urgency]
    rig.uses("x", own, external)
    return 9800 - own - external if urgency >= HIGH else 0


WAYS = pytest.mark.parametrize(("way", "extent"), [("all", 32), ("a page", 64), ("observed", 32)])
DEPTHS = pytest.mark.parametrize("depth", [1, 2])


@DEPTHS
@WAYS
@pytest.mark.parametrize("urgency", [LOW, MEDIUM, HIGH])
def test_memory_is_back_when_it_was_announced_and_nobody_stops(
    urgency: Urgency, way: str, extent: int, depth: int
) -> None:
    rig = loaded(depth, extent)
    asked_s, steps = rig.clock.now_s, rig.computed_steps
    rest, rounds = ask(rig, urgency, way), 0
    while rig.lent("x") > rest:
        assert rig.clock.now_s <= asked_s + urgency.bound_s
        rig.round()
        rounds += 1
        assert not rig.kv.wants_stop
    assert rig.clock.now_s <= asked_s + urgency.bound_s
    assert rig.computed_steps == steps + rounds and rig.preempted == 0
    assert rig.store.dropped and {name for name, _ in rig.store.dropped} == {"x"}
    assert rig.pool.stats().reclaims[urgency] == 1
    rig.land()
    rig.check_contents()


@DEPTHS
@WAYS
def test_what_is_critical_is_back_before_anything_is_computed(way: str, extent: int, depth: int) -> None:
    rig = loaded(depth, extent)
    steps, rest, rounds = rig.computed_steps, ask(rig, CRITICAL, way), 0
    while rig.lent("x") > rest:
        rig.round()
        rounds += 1
        assert rig.kv.wants_stop == (rig.lent("x") > rest)
    assert rig.computed_steps == steps and rounds == depth, "steps in flight arrive, then pages move at once"
    rig.round()
    assert rig.computed_steps == steps + 1 and rig.preempted == 0
    rig.land()
    rig.check_contents()


@DEPTHS
def test_a_low_urgency_is_spread_over_many_steps(depth: int) -> None:
    moved = {}
    for urgency in (LOW, HIGH, CRITICAL):
        rig = loaded(depth)
        before = len(rig.moves)
        ask(rig, urgency, "all")
        while rig.lent("x"):
            rig.round()
        moved[urgency] = [count for count in rig.moves[before:] if count]
        assert sum(moved[urgency]) >= 64
    assert max(moved[LOW]) <= 2 and len(moved[LOW]) >= 32, "a page of each region in a step"
    assert 4 <= max(moved[HIGH]) < 40 and len(moved[HIGH]) < 32
    assert len(moved[CRITICAL]) == 1


def test_where_nobody_has_room_sequences_make_way() -> None:
    rig = Rig(blocks=72, extent=32, budgets=[lenders()[0]])
    for _ in range(3):
        rig.fill(24)
    asked_s = rig.clock.now_s
    rest = ask(rig, HIGH, "a page")
    while rig.lent("x") > rest:
        rig.round()
        assert rig.clock.now_s <= asked_s + HIGH.bound_s
    assert rig.preempted == 2 and list(rig.live) == [1], "one of them fits into what is left, two do not"
    rig.check_contents()


def test_a_reclaim_that_is_called_off_opens_the_region_again() -> None:
    rig = loaded(1)
    rig.uses("x", own=8000)
    rig.rounds(0.1)
    assert rig.kv.pool.limit == 72 and rig.under_reclaim()
    moved = 64 - sum(len(blocks) for region, blocks in rig.away().items() if rig.store.regions[0, region][0] == "x")
    assert 0 < moved < 20
    rig.uses("x")
    rig.rounds(0.5)
    assert not rig.under_reclaim() and rig.store.dropped == []
    assert not any(region.closing for region in dict(rig.kv.pages.mapped)[0].regions.values())


def test_regions_that_only_hold_what_nobody_uses_go_first() -> None:
    """The older region goes, though younger ones go first by themselves."""
    rig = Rig(observe_s=0.25)
    rig.overflow.borrow(16)
    held = {}
    for region in (1, 2):
        held[region] = rig.fill(8)
        for block in list(rig.kv.table(held[region]).blocks):
            rig.kv.pages.move(0, block, region)
    rig.take()
    rig.finish()
    old, live = rig.away().values()
    rig.close(held[1])
    rig.clock.now_s += 0.3
    rig.kv.tick(0)
    assert [lease.priority for lease in rig.leases("x")][:2] == [0, 1]
    rig.pool.request_reclaim("x", 5 * PAGE, MEDIUM)
    reads = rig.extend(held[2], 0)
    assert reads is not None
    while not rig.store.dropped:
        assert rig.away()[2] == live
        rig.round(lambda: rig.take([reads]))
    assert rig.store.dropped == [("x", 9)]
    assert sorted(rig.kv.pool.cached_blocks()) == old and rig.kv.pool.evictions == 0, "there was room at home"


# -- when a region may go ---------------------------------------------------------------------------------------------


def away(blocks: int = 8) -> tuple[Rig, int]:
    """A sequence with all of its blocks at x, and the step that brought them there done."""
    rig = Rig()
    rig.overflow.borrow(blocks)
    seq_id = rig.fill(blocks)
    for block in list(rig.kv.table(seq_id).blocks):
        rig.kv.pages.move(0, block, 1)
    rig.take()
    rig.finish()
    return rig, seq_id


def test_a_region_is_dropped_when_the_step_with_its_last_move_is_done() -> None:
    rig, seq_id = away()

    def read() -> None:
        item = rig.extend(seq_id, 0)
        assert item is not None
        rig.take([item])

    read()  # where the blocks are now
    rig.pool.request_reclaim("x", rig.lent("x"), CRITICAL)
    rig.kv.tick(0)
    rig.kv.tick(0)
    assert rig.away()[1] == [] and rig.store.dropped == [], "a step in flight reads it, and the moves are not taken"
    read()
    rig.kv.tick(0)
    rig.finish()
    rig.kv.tick(0)
    assert rig.store.dropped == [], "the step with the moves is in flight"
    read()
    rig.finish()
    assert rig.store.dropped == [("x", 9)], "the step behind it does not matter"
    assert rig.lent("x") == 0 and LOCAL + 1 not in rig.away()
    rig.land()
    rig.check_contents()


def test_without_steps_in_flight_too_moves_come_before_the_drop() -> None:
    rig, _ = away()
    rig.pool.request_reclaim("x", PAGE, CRITICAL)
    for _ in range(3):
        rig.kv.tick(0)
        assert rig.store.dropped == [] and rig.kv.pages.has_ops
    rig.take()
    assert rig.store.dropped == []
    rig.finish()
    assert rig.store.dropped == [("x", 9)]
    rig.check_contents()


def test_a_region_into_which_a_step_in_flight_moves_is_not_dropped_though_it_is_empty() -> None:
    rig = Rig()
    rig.overflow.borrow(8)
    seq_id = rig.fill(8)
    for block in list(rig.kv.table(seq_id).blocks):
        rig.kv.pages.move(0, block, 1)
    rig.take()
    rig.close(seq_id)
    rig.kv.forget_cached()
    rig.pool.request_reclaim("x", PAGE, CRITICAL)
    rig.kv.tick(0)
    assert rig.away()[1] == [] and not rig.kv.pages.has_ops and rig.store.dropped == []
    rig.finish()
    rig.kv.tick(0)
    assert rig.store.dropped == [("x", 9)], "nothing is in flight: at once"
    rig.check()


def test_regions_that_are_dropped_too_early_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_early(self: KVOverflow) -> None:
        self._drop([loan for loan in self._loans.values() if loan.region.closing and not loan.region.blocks])

    monkeypatch.setattr(KVOverflow, "_release_empty", too_early)
    with pytest.raises(KeyError):
        _ = [run_chaos(seed) for seed in range(10)]


# -- ahead of need, and after it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("local", [(16,), (16, 24), (16, 40)])
def test_memory_that_was_not_used_for_the_hold_time_goes_back(local: tuple[int, ...]) -> None:
    rig = Rig(local)
    seq_id = rig.fill(32)
    assert rig.leases() and rig.kv.pool.limit == 32
    rig.rounds(HOLD_S + 1)
    assert rig.store.dropped == [], "it is in use"
    rig.close(seq_id)
    rig.rounds(HOLD_S - 0.5)
    assert rig.store.dropped == []
    rig.rounds(1)
    assert rig.leases() == [] and rig.store.regions == {} and rig.pool.lent_bytes() == 0
    assert rig.kv.pool.limit == 16 and rig.kv.is_idle


def test_what_goes_back_leaves_room_for_what_is_in_use() -> None:
    rig = Rig((16,))
    rig.fill(20)
    rig.close(rig.fill(28))
    rig.rounds(HOLD_S + 1)
    assert rig.kv.pool.limit == 40, "20 in use, and two extents"
    assert [lease.lease_id for lease in rig.leases()] == [1, 2, 3], "the youngest went"
    assert rig.store.dropped and rig.preempted == 0
    rig.check_contents()


def test_growth_borrows_before_the_pool_is_dry() -> None:
    rig = Rig((16,))
    seq_id = rig.open([])
    short: list[int] = []
    ensure_free = rig.kv.ensure_free

    def asked(blocks: int) -> bool:
        short.extend([blocks] if blocks > rig.kv.pool.num_free else [])
        return ensure_free(blocks)

    rig.kv.ensure_free = asked  # type: ignore[method-assign]

    def grow() -> None:
        rig.live[seq_id].tokens += [1] * BLOCK
        item = rig.extend(seq_id, BLOCK)
        assert item is not None
        rig.take([item])

    for blocks in range(1, 49):
        rig.round(grow)
        assert rig.kv.pool.num_free > 0 and rig.kv.pool.num_referenced == blocks
        assert rig.kv.pool.limit - blocks <= 40, "not everything at once either"
    assert short == [] and rig.leases()
    rig.check_contents()


def test_region_numbers_are_used_again() -> None:
    """Stages keep them in 16 bits; a server that runs for months borrows more often than that."""
    rig = Rig()
    rig.store.refusing = {"x", "y"}
    for _ in range(40):
        rig.overflow.borrow(8)
        rig.clock.now_s += REFUSED_S
    rig.store.refusing = set()
    rig.overflow.borrow(8)
    assert set(rig.away()) == {1}
    rig.pool.request_reclaim("x", PAGE, LOW)
    rig.tick()
    assert rig.leases("x") == []
    rig.overflow.borrow(16)
    assert set(rig.away()) == {1, 2}
    rig.check()


# -- whatever happens -------------------------------------------------------------------------------------------------


def test_500_reclaims_at_any_moment_lose_nothing() -> None:
    worlds: list[Chaos] = []

    @settings(max_examples=80)
    @given(st.integers(0, 1 << 30))
    def run(seed: int) -> None:
        worlds.append(run_chaos(seed))

    run()
    assert sum(world.reclaims for world in worlds) >= 500
    assert sum(len(world.store.dropped) for world in worlds) > 200
    assert sum(sum(world.moves) for world in worlds) > 2000
    assert sum(world.kv.pages.moved_out for world in worlds) > 500
    assert sum(world.preempted for world in worlds) > 20
    chosen = [world.overflow.homecoming.decisions for world in worlds if world.overflow.homecoming is not None]
    assert any(made[Choice.FETCH] for made in chosen)
    assert {name for world in worlds for name, _ in world.store.dropped} == {"x", "y", "s0", "s1", "host"}


def test_pool_is_within_its_limit_again_when_users_go() -> None:
    """All is in flight when memory is taken away, so nobody can be preempted; then sequences end by themselves."""
    rig = Rig((20,), blocks=40, budgets=[lenders()[0]])
    held = [rig.fill(10) for _ in range(3)]
    rig.take([item for item in map(rig.refresh_last, held) if item is not None])
    rig.pool.request_reclaim("x", None, MEDIUM)
    rig.tick()
    assert (rig.kv.pool.limit, rig.kv.pool.num_referenced, rig.preempted) == (20, 30, 0)
    rig.finish()
    rig.close(held[1])
    rig.close(held[2])
    rig.check()
    assert rig.kv.pool.num_holding == 20
    rig.rounds(MEDIUM.bound_s)
    assert rig.leases() == [] and list(rig.live) == held[:1]
    assert rig.refresh_last(held[0]) is not None
