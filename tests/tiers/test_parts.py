"""Blocks of which other machines have parts: whole below main memory, divided in it; and tiers that lose blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
from memory_helpers import (
    GREEDY,
    LAYOUT,
    Clock,
    InProcessPeer,
    await_loading,
    block,
    load_bytes,
    open_memory,
    open_store,
    payload,
    save_chain,
)
from steering import LONGEST_WAIT_S

from core.devices import DeviceBudget, host_device
from core.tiers import HierarchicalMemory, Tier
from core.tiers.compress import Compressor
from core.tiers.disk import LocalFiles
from core.tiers.lower_tier import LowerTier
from core.tiers.parts import BlockParts
from core.tiers.peer import PeerStore
from core.tiers.policy import MemoryOptions
from core.tiers.records import TierSpeed

HERE = [slice(0, 100), slice(300, LAYOUT.nbytes)]
THERE = slice(100, 300)
SLOTS = 3


class Elsewhere:
    """Another machine's parts, by slot; `lost`: it is gone."""

    def __init__(self, num_slots: int = SLOTS) -> None:
        self.num_slots, self.machines = num_slots, 1
        self.kept: dict[int, tuple[bytes, bytes]] = {}
        self.lost = self.closed = False

    def get(self, slot: int, block: bytes, payload: memoryview) -> bool:
        if self.lost or self.kept.get(slot, (b"",))[0] != block:
            return False
        payload[THERE] = self.kept[slot][1]
        return True

    def put(self, slot: int, block: bytes, payload: memoryview) -> bool:
        self.kept[slot] = block, bytes(payload[THERE])
        return not self.lost

    def close(self) -> None:
        self.closed = True


def in_slot(number: int) -> bytes:
    data = payload(number)
    return b"".join(data[part] for part in HERE)


def open_divided(elsewhere: Elsewhere, host_bytes: int = 1 << 16) -> tuple[HierarchicalMemory, DeviceBudget]:
    budget = DeviceBudget(host_device(1 << 20))
    parts = BlockParts(LAYOUT.nbytes, HERE, elsewhere)
    options = MemoryOptions(host_bytes=host_bytes, rules=GREEDY)
    return HierarchicalMemory(LAYOUT, options, budget, clock=Clock(), parts=parts), budget


def step_saves(memory: HierarchicalMemory, elsewhere: Elsewhere, number: int) -> None:
    """What stages do: each machine fills its part of the slot."""
    slot = memory.reserve(block(number), block(number - 1))
    assert slot is not None
    slot.view()[:] = in_slot(number)
    elsewhere.kept[slot.index] = block(number), payload(number)[THERE]
    memory.commit(slot)
    assert memory.flush(LONGEST_WAIT_S)


def peer_tier(blocks: int = 8) -> LowerTier:
    store = PeerStore(InProcessPeer(blocks * LAYOUT.nbytes), Compressor(LAYOUT), LAYOUT.nbytes)
    return LowerTier(store, TierSpeed(1e9, 1e9))


def test_blocks_are_whole_below_and_divided_above(tmp_path: Path) -> None:
    elsewhere = Elsewhere()
    memory, budget = open_divided(elsewhere)
    store = open_store(LocalFiles(tmp_path))
    memory.add_below([LowerTier(store, TierSpeed(1e9, 1e9))])
    assert memory.num_slots == SLOTS
    assert budget.used_bytes == SLOTS * (LAYOUT.nbytes - 200)
    for number in range(1, 7):
        step_saves(memory, elsewhere, number)
    read = bytearray(LAYOUT.nbytes)
    for number in range(1, 7):
        assert store.read(block(number), memoryview(read)) and bytes(read) == payload(number)
    elsewhere.kept.clear()
    loading = memory.load([block(1), block(2)])
    await_loading(loading)
    for number, slot in enumerate(loading.slots(), 1):
        assert bytes(slot.view()) == in_slot(number)
        assert elsewhere.kept[slot.index] == (block(number), payload(number)[THERE])
    assert len(loading.slots()) == 2
    loading.release()
    memory.check_invariants()
    memory.close()
    assert elsewhere.closed and budget.used_bytes == 0


def test_a_block_of_which_a_part_is_gone_goes_nowhere() -> None:
    elsewhere = Elsewhere()
    memory, _ = open_divided(elsewhere)
    lower = peer_tier()
    memory.add_below([lower])
    step_saves(memory, elsewhere, 1)
    assert block(1) in lower.index
    elsewhere.lost = True
    for number in (11, 21, 31):  # the last one pushes the first out of main memory
        step_saves(memory, elsewhere, number)
        assert block(number) not in lower.index
    assert memory.find([block(1)]) == [Tier.L4]
    loading = memory.load([block(1)])
    await_loading(loading)
    assert not loading.slots(), "it cannot be divided again"
    loading.release()
    memory.check_invariants()
    memory.close()


@pytest.mark.parametrize(("host_bytes", "slots"), [(1 << 16, SLOTS), (2 * (LAYOUT.nbytes - 200), 2)])
def test_the_machine_with_least_room_decides(host_bytes: int, slots: int) -> None:
    memory, _ = open_divided(Elsewhere(), host_bytes)
    assert memory.num_slots == slots
    assert memory.stats().tiers[0].capacity_bytes == slots * LAYOUT.nbytes
    assert memory.stats().tiers[0].medium == "of 2 machines"
    memory.close()


def test_a_machine_without_layers_has_slots_without_bytes() -> None:
    elsewhere, budget = Elsewhere(), DeviceBudget(host_device(100))
    parts = BlockParts(200, [], elsewhere)
    assert parts.slots_in(0) == SLOTS and parts.machines == 1
    memory = HierarchicalMemory(LAYOUT, MemoryOptions(host_bytes=0), budget, parts=parts)
    slot = memory.reserve(block(1), b"")
    assert slot is not None and len(slot.view()) == 0
    memory.commit(slot)
    assert memory.find([block(1)]) == [Tier.L3]
    memory.check_invariants()
    memory.close()
    assert budget.used_bytes == 0


def test_what_a_tier_has_lost_is_found_there_no_more_and_counted(tmp_path: Path) -> None:
    lower, disk = peer_tier(), LowerTier(open_store(LocalFiles(tmp_path)), TierSpeed(1e6, 1e6))
    with open_memory(slots=2, below=[lower], rules=GREEDY) as memory:
        save_chain(memory, 6)
        assert memory.find([block(1), block(2)]) == [Tier.L4, Tier.L4]
        memory.add_below([disk])
        for number in (1, 2):
            assert memory.promote(block(number))
        assert memory.flush(LONGEST_WAIT_S)
        memory.forget(Tier.L4, [block(1), block(3), block(99)])
        moves = memory.stats().moves
        assert moves["eviction", Tier.L4, None] == 2
        assert memory.find([block(3)]) == [] and memory.find([block(1)]) == [Tier.L3]
        assert lower.stats(memory.heat.spread([], 0.0)).blocks == 4


def test_a_restart_finds_what_only_another_machine_would_have_had(tmp_path: Path) -> None:
    """A tier that goes with the process takes blocks beside the one that does not, never instead of it."""
    fast, disk = peer_tier(), LowerTier(open_store(LocalFiles(tmp_path)), TierSpeed(1e6, 1e6))
    with open_memory(slots=2, below=[fast, disk], rules=GREEDY) as memory:
        assert memory.lasts
        save_chain(memory, 6)
        assert len(fast.index) == len(disk.index) == 6
        assert memory.find([block(1)]) == [Tier.L4], "the faster one is read"
        assert load_bytes(memory, [block(1)]) == [payload(1)]
    with open_memory(slots=2, below=[peer_tier()], rules=GREEDY) as memory:
        assert not memory.lasts


def test_writes_are_as_fast_as_the_slowest_network_allows() -> None:
    with open_memory(slots=2, write_bytes_s=1e6) as memory:
        pace = memory._writer._pace
        memory.limit_writes(2e6)
        assert pace.bytes_s == 1e6
        memory.limit_writes(1e5)
        assert pace.bytes_s == 1e5
    with open_memory(slots=2) as memory:
        memory.limit_writes(1e5)
        assert memory._writer._pace.bytes_s == 1e5
