"""Blocks go down and come back byte for byte, and nobody waits for them."""

from __future__ import annotations

import threading
import time
import weakref
from pathlib import Path

import pytest
from fake_runtime import FakeRuntime
from memory_helpers import (
    GREEDY,
    LAYOUT,
    Clock,
    InProcessPeer,
    await_loading,
    block,
    fill,
    load_bytes,
    open_memory,
    open_store,
    payload,
    save,
    save_chain,
)
from steering import LONGEST_WAIT_S, until

from core.devices import DeviceBudget, host_device, pinned
from core.tiers import HierarchicalMemory, Tier
from core.tiers.compress import Compressor
from core.tiers.disk import LocalFiles
from core.tiers.loading import Loading
from core.tiers.lower_tier import LowerTier
from core.tiers.peer import PeerStore
from core.tiers.policy import MemoryOptions
from core.tiers.records import TierSpeed
from core.tiers.segments import SUFFIX


def peer_tier(blocks: int = 64) -> LowerTier:
    peer = InProcessPeer(blocks * LAYOUT.nbytes)
    return LowerTier(PeerStore(peer, Compressor(LAYOUT, "zstd"), LAYOUT.nbytes), TierSpeed(1e9, 1e9))


def disk_tier(path: Path) -> LowerTier:
    return LowerTier(open_store(LocalFiles(path)), TierSpeed(1e8, 1e8))


def await_writes(memory: HierarchicalMemory) -> None:
    """Until nothing is queued; unlike `flush`, nothing more is written."""
    until(lambda: not memory.stats().queued_writes, "everything is written")


class SlowTier(LowerTier):
    """A tier whose writes wait for `gate` and whose reads wait for `read_gate`."""

    def __init__(self, blocks: int = 64) -> None:
        inner = peer_tier(blocks)
        super().__init__(inner.store, inner.speed)
        self.gate = threading.Event()
        self.read_gate = threading.Event()
        self.started = threading.Event()
        self.write_order: list[bytes] = []
        self.reads = 0
        self.fails = False

    def write(self, block: bytes, parent: bytes, payload: memoryview) -> bool:
        self.started.set()
        assert self.gate.wait(LONGEST_WAIT_S)
        self.write_order.append(block)
        return self.store.write(block, parent, payload)

    def read(self, block: bytes, into: memoryview) -> bool:
        assert self.read_gate.wait(LONGEST_WAIT_S)
        self.reads += 1
        if self.fails:
            raise RuntimeError("a bug in a driver")
        return self.store.read(block, into)


# -- host RAM alone ----------------------------------------------------------------------------------------------------


def test_a_committed_block_is_found_and_read_back() -> None:
    with open_memory(slots=2) as memory:
        slot = memory.reserve(block(1), block(0))
        assert slot is not None
        fill(slot, 1)
        assert memory.find([block(1)]) == [], "not before its content is complete"
        memory.commit(slot)
        assert memory.find([block(1), block(2)]) == [Tier.L3]
        assert load_bytes(memory, [block(1)]) == [payload(1)]


def test_a_block_already_there_is_not_reserved_again() -> None:
    with open_memory(slots=2) as memory:
        save(memory, 1, 0)
        assert memory.reserve(block(1), block(0)) is None
        first = memory.reserve(block(2), block(1))
        assert first is not None and memory.reserve(block(2), block(1)) is None
        memory.abandon(first)
        with pytest.raises(ValueError, match="not reserved"):
            memory.commit(first)
        assert memory.reserve(block(2), block(1)) is not None


def test_pinned_blocks_stay_and_reserve_says_so() -> None:
    with open_memory(slots=1) as memory:
        save(memory, 1, 0)
        loading = memory.load([block(1)])
        assert loading.done() and [slot.block for slot in loading.slots()] == [block(1)]
        assert memory.reserve(block(2), block(0)) is None
        loading.release()
        loading.release()
        assert memory.reserve(block(2), block(0)) is not None


def test_the_coldest_tail_makes_room(clock: Clock) -> None:
    with open_memory(slots=4, clock=clock) as memory:
        for number, parent in ((1, 0), (2, 1), (11, 10), (12, 11)):
            clock.now_s += 1
            save(memory, number, parent)
        memory.touch(block(1), block(2))
        for number, gone in ((21, 12), (22, 11)):
            clock.now_s += 1
            save(memory, number, 20)
            assert memory.find([block(gone)]) == []
        assert memory.find([block(1), block(2)]) == [Tier.L3, Tier.L3]
        assert memory.stats().moves["eviction", Tier.L3, None] == 2


def test_lookups_count_hits_and_misses_in_every_tier_asked() -> None:
    with open_memory(slots=2, below=[peer_tier()], rules=GREEDY) as memory:
        save(memory, 1, 0)
        assert memory.flush(LONGEST_WAIT_S)
        memory.find([block(1), block(2)])
        memory.find([block(1), block(2)], record=False)
        host, peer = memory.stats().tiers
        assert (host.hits, host.misses) == (1, 1)
        assert (peer.hits, peer.misses) == (0, 1)


# -- tiers below -------------------------------------------------------------------------------------------------------


def test_blocks_come_back_from_below(clock: Clock) -> None:
    with open_memory(slots=2, below=[peer_tier()], clock=clock, rules=GREEDY) as memory:
        save_chain(memory, 4)
        tiers = memory.find([block(i) for i in range(1, 5)])
        assert Tier.L4 in tiers and len(tiers) == 4
        done: list[Loading] = []
        loading = memory.load([block(1), block(2)], done.append)
        await_loading(loading)
        assert [bytes(slot.view()) for slot in loading.slots()] == [payload(1), payload(2)]
        loading.release(restored=2)
        assert done == [loading]
        moves = memory.stats().moves
        assert moves["promotion", Tier.L3, Tier.L1] == 2
        assert moves["promotion", Tier.L4, Tier.L3] == 2
        assert moves["demotion", Tier.L1, Tier.L3] == 4


def test_two_loads_of_one_block_read_it_once_and_both_get_it() -> None:
    slow = SlowTier()
    with open_memory(slots=1, below=[slow], rules=GREEDY) as memory:
        slow.gate.set()
        save_chain(memory, 2)
        first, second = memory.load([block(1)]), memory.load([block(1)])
        assert not first.done() and not second.done() and first.slots() == []
        slow.read_gate.set()
        await_loading(first, second)
        assert slow.reads == 1
        assert [bytes(slot.view()) for slot in second.slots()] == [payload(1)]
        first.release()
        assert memory.reserve(block(9), block(0)) is None, "the second still pins it"
        second.release()
        assert memory.stats().moves["promotion", Tier.L4, Tier.L3] == 1


def test_a_loading_released_before_it_is_done_pins_nothing() -> None:
    slow = SlowTier()
    with open_memory(slots=1, below=[slow], rules=GREEDY) as memory:
        slow.gate.set()
        save_chain(memory, 2)
        loading = memory.load([block(1)])
        loading.release()
        slow.read_gate.set()
        await_loading(loading)
        assert memory.reserve(block(9), block(0)) is not None


def test_a_load_is_as_long_as_there_is_room() -> None:
    with open_memory(slots=2, below=[peer_tier()], rules=GREEDY) as memory:
        save_chain(memory, 4)
        assert load_bytes(memory, [block(i) for i in range(1, 5)]) == [payload(1), payload(2)]


def test_a_run_gives_its_tail_up_for_its_head_and_pins_what_it_gives(clock: Clock) -> None:
    with open_memory(slots=3, below=[peer_tier()], clock=clock, rules=GREEDY) as memory:
        for number in (1, 2, 3):
            save(memory, number, number - 1)
        assert memory.flush(LONGEST_WAIT_S) and memory.demote(block(1))  # all three leave
        assert memory.flush(LONGEST_WAIT_S)
        for number, parent in ((11, 10), (12, 11), (2, 1)):
            save(memory, number, parent)
        busy = memory.load([block(12)])  # 11 and 12 are in use
        loading = memory.load([block(1), block(2)])
        await_loading(loading)
        assert [bytes(slot.view()) for slot in loading.slots()] == [payload(1)]
        assert memory.reserve(block(21), block(20)) is None, "everything is pinned"
        loading.release()
        busy.release()


def test_a_tail_that_was_given_up_and_stayed_is_pinned_again() -> None:
    with open_memory(slots=4, below=[peer_tier()], rules=GREEDY) as memory:
        for number in (1, 2, 3):
            save(memory, number, number - 1)
        assert memory.flush(LONGEST_WAIT_S) and memory.demote(block(1))
        assert memory.flush(LONGEST_WAIT_S)
        save(memory, 3, 2)
        for number in (11, 12):
            save(memory, number, 10)
        reserved = memory.reserve(block(13), block(10))
        assert reserved is not None
        busy = memory.load([block(11)]), memory.load([block(12)])
        loading = memory.load([block(1), block(2), block(3)])
        await_loading(loading)
        assert [slot.block for slot in loading.slots()] == [block(1)]
        loading.release()
        for other in busy:
            other.release()
        memory.abandon(reserved)


def test_a_block_colder_than_all_of_a_full_tier_does_not_go_there() -> None:
    lower = peer_tier(2)
    with open_memory(slots=4, below=[lower]) as memory:
        for number in (1, 2):
            for _ in range(2):
                memory.touch(block(number))
            save(memory, number, 0)
        assert memory.flush(LONGEST_WAIT_S)
        held = set(lower.index)
        assert held
        save(memory, 3, 0)
        assert memory.flush(LONGEST_WAIT_S)
        assert held <= set(lower.index)


def test_a_failing_driver_costs_a_miss_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    slow = SlowTier()
    slow.gate.set()
    slow.read_gate.set()
    with open_memory(slots=1, below=[slow], rules=GREEDY) as memory:
        save_chain(memory, 2)
        slow.fails = True
        assert load_bytes(memory, [block(1)]) == []
        assert memory.find([block(1)]) == []
        slow.fails = False
        save(memory, 3, 0)
        assert memory.flush(LONGEST_WAIT_S)
        assert save(memory, 4, 0) and load_bytes(memory, [block(3)]) == [payload(3)], "the worker goes on"
    assert any("memory worker failed" in record.getMessage() for record in caplog.records)


def test_a_failing_driver_does_not_hold_up_the_blocks_behind() -> None:
    slow = SlowTier()
    slow.gate.set()
    with open_memory(slots=12, below=[slow], rules=GREEDY) as memory:
        for number in range(1, 11):
            save(memory, number, number - 1)
        assert memory.flush(LONGEST_WAIT_S) and memory.demote(block(1))
        slow.fails = True
        loading = memory.load([block(number) for number in range(1, 11)])
        assert len(loading.blocks) == 10
        slow.read_gate.set()
        await_loading(loading)
        assert loading.slots() == []
        loading.release()


def test_a_damaged_block_ends_the_run(tmp_path: Path) -> None:
    with open_memory(slots=3, below=[disk_tier(tmp_path)], rules=GREEDY) as memory:
        save_chain(memory, 3)
        for number in (11, 12, 13):
            save(memory, number, 10)
        (path,) = [path for path in tmp_path.glob("*" + SUFFIX) if payload(2) in path.read_bytes()]
        data = bytearray(path.read_bytes())
        data[data.index(payload(2))] ^= 1
        path.write_bytes(data)
        run = [block(1), block(2), block(3)]
        assert memory.find(run) == [Tier.L5] * 3
        assert load_bytes(memory, run) == [payload(1)]
        assert memory.find(run) == [Tier.L3]
        assert memory.stats().tiers[1].damaged == 1


def test_only_blocks_used_again_are_written_at_once_and_the_rest_before_they_leave() -> None:
    lower = peer_tier()
    with open_memory(slots=12, below=[lower]) as memory:
        save(memory, 1, 0)
        memory.touch(block(2))
        memory.touch(block(2))
        save(memory, 2, 0)
        await_writes(memory)
        assert set(lower.index) == {block(2)}
        for number in range(3, 30):
            save(memory, number, 0)
            await_writes(memory)
        everything = [block(number) for number in range(1, 30)]
        assert all(memory.find([name]) for name in everything), "nothing was lost"
        assert memory.stats().moves["demotion", Tier.L3, Tier.L4] == 29 - 12
        assert ("eviction", Tier.L3, None) not in memory.stats().moves


@pytest.mark.parametrize(("half_lives", "written"), [(2.9, True), (3.1, False), (10.0, False)])
def test_cold_blocks_are_not_written(clock: Clock, half_lives: float, written: bool) -> None:
    lower = peer_tier()
    with open_memory(slots=2, below=[lower], clock=clock, half_life_s=100.0) as memory:
        save(memory, 1, 0)
        clock.now_s += half_lives * 100.0
        assert memory.flush(LONGEST_WAIT_S) and len(lower.index) == written


def test_only_blocks_used_again_are_written_at_once(clock: Clock) -> None:
    lower = peer_tier()
    with open_memory(slots=8, below=[lower], clock=clock) as memory:
        memory.touch(block(2))
        for number in (1, 2):
            save(memory, number, 0)
        await_writes(memory)
        assert list(lower.index) == [block(2)]


def test_a_full_queue_gives_up_cold_writes_and_nobody_waits(clock: Clock) -> None:
    slow = SlowTier()
    with open_memory(slots=8, below=[slow], clock=clock, rules=GREEDY, max_queued_writes=2) as memory:
        save(memory, 1, 0)
        assert slow.started.wait(LONGEST_WAIT_S)  # its write hangs
        for number in range(2, 5):
            save(memory, number, 0)
        memory.touch(block(9))
        memory.touch(block(9))
        save(memory, 9, 0)
        stats = memory.stats()
        assert stats.queued_writes == 3 and stats.dropped_writes == 2
        for number in range(11, 40):
            assert save(memory, number, 0), "saving goes on while the tier below hangs"
        slow.gate.set()
        assert memory.flush(LONGEST_WAIT_S)
        assert slow.write_order[0] == block(1)


def test_a_block_being_written_is_not_overwritten() -> None:
    slow = SlowTier()
    with open_memory(slots=1, below=[slow], rules=GREEDY) as memory:
        save(memory, 1, 0)
        assert slow.started.wait(LONGEST_WAIT_S)
        assert memory.reserve(block(2), block(0)) is None
        slow.gate.set()
        slow.read_gate.set()
        assert memory.flush(LONGEST_WAIT_S)
        assert save(memory, 2, 0)
        assert load_bytes(memory, [block(1)]) == [payload(1)]


def test_a_block_that_is_being_read_is_not_pushed_out_of_its_tier() -> None:
    slow = SlowTier(2)
    slow.gate.set()
    with open_memory(slots=4, below=[slow], rules=GREEDY) as memory:
        for number in (1, 2):
            save(memory, number, 0)
            assert memory.flush(LONGEST_WAIT_S) and memory.demote(block(number))
        loadings = [memory.load([block(1)]), memory.load([block(2)])]
        for _ in range(5):
            memory.touch(block(3))
        save(memory, 3, 0)
        await_writes(memory)
        slow.read_gate.set()
        for loading, number in zip(loadings, (1, 2), strict=True):
            await_loading(loading)
            assert [bytes(slot.view()) for slot in loading.slots()] == [payload(number)]
            loading.release()


def test_write_back_keeps_its_pace_and_flush_does_not_wait_for_it() -> None:
    slow = SlowTier()
    slow.gate.set()
    with open_memory(slots=4, below=[slow], rules=GREEDY, write_bytes_s=1.0) as memory:
        for number in (1, 2, 3):
            save(memory, number, 0)
        until(lambda: slow.write_order, "the first write")
        time.sleep(0.05)  # the second write is due in minutes
        assert slow.write_order == [block(1)] and memory.stats().queued_writes == 2
        assert memory.flush(LONGEST_WAIT_S)
        assert slow.write_order == [block(1), block(2), block(3)]


def test_what_is_written_lasts_after_a_while_without_being_asked_to(tmp_path: Path) -> None:
    """A process that is killed loses what was written since."""
    with open_memory(slots=4, below=[disk_tier(tmp_path)], rules=GREEDY, seal_s=0.02) as memory:
        for number in (1, 2):
            save(memory, number, 0)
            until(lambda count=number: len(list(tmp_path.glob("*" + SUFFIX))) >= count, "its file is there")
            assert len(list(tmp_path.glob("*" + SUFFIX))) == number


def test_flush_gives_up_in_time() -> None:
    slow = SlowTier()
    with open_memory(slots=1, below=[slow], rules=GREEDY) as memory:
        save(memory, 1, 0)
        assert not memory.flush(0.01)
        slow.gate.set()
        assert memory.flush(LONGEST_WAIT_S)


def test_a_full_tier_lets_its_coldest_sink_to_the_next(tmp_path: Path) -> None:
    below = [peer_tier(3), disk_tier(tmp_path)]
    with open_memory(slots=2, below=below, rules=GREEDY) as memory:
        save_chain(memory, 8)
        run = [block(number) for number in range(1, 9)]
        assert all(memory.find([name]) for name in run)
        moves = memory.stats().moves
        assert moves["demotion", Tier.L4, Tier.L5] > 0 and ("eviction", Tier.L4, None) not in moves
        for name, number in zip(run, range(1, 9), strict=True):
            assert load_bytes(memory, [name]) == [payload(number)]


def test_a_restart_finds_what_was_flushed(tmp_path: Path) -> None:
    with open_memory(slots=4, below=[disk_tier(tmp_path)]) as memory:
        for number in range(1, 5):
            save(memory, number, number - 1)
        assert memory.flush(LONGEST_WAIT_S)
    with open_memory(slots=4, below=[disk_tier(tmp_path)]) as memory:
        run = [block(number) for number in range(1, 5)]
        assert memory.find(run) == [Tier.L5] * 4
        assert load_bytes(memory, run) == [payload(number) for number in range(1, 5)]


# -- by call -----------------------------------------------------------------------------------------------------------


def test_promote_and_demote_by_call() -> None:
    with open_memory(slots=4, below=[peer_tier()]) as memory:
        for number in (1, 2, 3):
            save(memory, number, number - 1)
        assert memory.demote(block(2)), "and the block that continues it"
        assert memory.flush(LONGEST_WAIT_S)
        assert memory.find([block(1), block(2), block(3)]) == [Tier.L3, Tier.L4, Tier.L4]
        assert memory.promote(block(2))
        assert memory.flush(LONGEST_WAIT_S)
        loading = memory.load([block(2)])
        await_loading(loading)
        assert not memory.demote(block(2)), "in use"
        loading.release()
        assert not memory.promote(block(2)) and not memory.promote(block(9)) and not memory.demote(block(9))


@pytest.mark.parametrize("fails", [False, True])
def test_a_promotion_is_over_when_it_has_been_answered(fails: bool) -> None:
    slow = SlowTier()
    with open_memory(slots=1, below=[slow], rules=GREEDY) as memory:
        slow.gate.set()
        save_chain(memory, 2)
        slow.fails = fails
        opening = threading.Timer(0.1, slow.read_gate.set)
        opening.start()
        assert memory.promote(block(1)) is not fails, "one that cannot be read has not come up"
        assert slow.reads == 1
        assert (memory.find([block(1)]) == [Tier.L3]) is not fails
        opening.join()


def test_without_a_tier_below_nothing_is_demoted() -> None:
    with open_memory(slots=1) as memory:
        save(memory, 1, 0)
        assert not memory.demote(block(1))
        assert memory.find([block(1)]) == [Tier.L3]


def test_the_view_of_blocks_is_hottest_first(clock: Clock) -> None:
    with open_memory(slots=3, clock=clock) as memory:
        for number in (1, 2, 3):
            save(memory, number, 0)
        memory.touch(block(2))
        hottest, *_ = view = memory.blocks(Tier.L3, 2)
        assert len(view) == 2 and hottest.hash == block(2) and hottest.hotness == 1.5
        assert memory.blocks(Tier.L5, 2) == []
        assert memory.stats().tiers[0].hotness.mean == pytest.approx(3.5 / 3)


def test_statistics_show_what_happened() -> None:
    with open_memory(slots=1) as memory:
        for number in (1, 2):
            save(memory, number, 0)
        stats = memory.stats()
        assert [(tier.tier, tier.blocks, tier.hotness.mean) for tier in stats.tiers] == [(Tier.L3, 1, 1.0)]
        assert stats.moves == {("demotion", Tier.L1, Tier.L3): 2, ("eviction", Tier.L3, None): 1}


def test_closing_twice_is_harmless_and_ends_everything() -> None:
    with open_memory(slots=2) as memory:
        save(memory, 1, 0)
        memory.close()
        assert memory.reserve(block(2), block(0)) is None
        assert memory.load([block(1)]).done()


def test_the_arena_is_registered_for_gpus_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeRuntime()
    monkeypatch.setattr(pinned, "gpu_runtime", lambda: runtime)
    host = DeviceBudget(host_device(3 * LAYOUT.nbytes))
    memory = HierarchicalMemory(LAYOUT, MemoryOptions(3 * LAYOUT.nbytes, pin=True), host)
    slot = memory.reserve(block(1), b"")
    assert slot is not None and memory.stats().tiers[0].medium == "pinned"
    (first,) = runtime.registered
    assert first <= slot.buffer.data_ptr() < first + runtime.registered[first]
    assert host.used_by_purpose() == {"kv_tiers": 3 * LAYOUT.nbytes}
    memory.commit(slot)
    memory.close()
    assert runtime.registered == {} and host.used_bytes == 0


def test_a_closed_memory_gives_its_slots_back_whoever_still_has_it(tmp_path: Path) -> None:
    """And whoever holds a loading may release it as ever."""
    with open_memory(slots=4, below=[disk_tier(tmp_path)]) as memory:
        save_chain(memory, 2)
        loading = memory.load([block(1), block(2)])
        await_loading(loading)
        arena = weakref.ref(memory._host._arena._base)
        memory.close()
        assert arena() is not None, "the loading has it"
        loading.release()
        del loading
        assert arena() is None
        assert memory.stats().tiers[0].bytes == 0
        assert load_bytes(memory, [block(1)]) == []
        assert memory.reserve(block(3), block(2)) is None


def test_tiers_may_be_added_later_and_hold_blocks_from_before(tmp_path: Path) -> None:
    with open_memory(slots=4, below=[disk_tier(tmp_path)], rules=GREEDY) as memory:
        save_chain(memory, 2)
    with open_memory(slots=4, below=[peer_tier(2)], rules=GREEDY) as memory:
        save_chain(memory, 1, first=7)
        memory.add_below([disk_tier(tmp_path)], {Tier.L6: "not there"})
        assert [tier.tier for tier in memory.stats().tiers] == [Tier.L3, Tier.L4, Tier.L5], "fastest first"
        assert memory.troubles() == {Tier.L6: "not there"}
        assert load_bytes(memory, [block(1), block(2)]) == [payload(1), payload(2)]
        for number in range(10, 20):
            assert save(memory, number, 0) and memory.flush(LONGEST_WAIT_S)
        disk = next(tier for tier in memory.stats().tiers if tier.tier == Tier.L5)
        assert disk is not None and disk.blocks > 2, "what the peer has no room for sinks on"
