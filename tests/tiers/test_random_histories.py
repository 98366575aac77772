"""Whatever happens in whatever order: invariants hold, and a block that comes back is the one that went."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_helpers import (
    GREEDY,
    LAYOUT,
    Clock,
    InProcessPeer,
    await_loading,
    block,
    fill,
    open_memory,
    open_store,
    payload,
)
from steering import LONGEST_WAIT_S

from core.tiers import HierarchicalMemory, Tier
from core.tiers.compress import CodecChoice, Compressor
from core.tiers.disk import LocalFiles
from core.tiers.loading import Loading
from core.tiers.lower_tier import LowerTier
from core.tiers.parts import HostSlot
from core.tiers.peer import PeerStore
from core.tiers.records import TierSpeed
from core.tiers.segments import SUFFIX

CHAINS, LENGTH = 4, 5
NUMBERS = st.integers(0, CHAINS * LENGTH - 1)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["reserve", "commit", "abandon", "load", "release", "touch", "promote", "demote", "flush", "damage", "wait"]
        ),
        NUMBERS,
    ),
    max_size=60,
)


def number_of(index: int) -> int:
    """Chains of blocks 101, 102 ..; 201, 202 .."""
    return 100 * (index // LENGTH + 1) + index % LENGTH + 1


class History:
    """Applies steps to a memory and checks what it gives back."""

    def __init__(self, memory: HierarchicalMemory, directory: Path) -> None:
        self.memory = memory
        self.directory = directory
        self.reserved: list[HostSlot] = []
        self.loadings: list[Loading] = []

    def apply(self, kind: str, index: int) -> None:
        number = number_of(index)
        name = block(number)
        chain = [block(number_of(index - index % LENGTH + step)) for step in range(LENGTH)]
        if kind == "reserve":
            slot = self.memory.reserve(name, block(number - 1))
            if slot is not None:
                fill(slot, number)
                self.reserved.append(slot)
        elif kind == "commit" and self.reserved:
            self.memory.commit(self.reserved.pop())
        elif kind == "abandon" and self.reserved:
            self.memory.abandon(self.reserved.pop())
        elif kind == "load":
            self.loadings.append(self.memory.load(chain))
        elif kind == "release" and self.loadings:
            self.check_and_release(self.loadings.pop(0))
        elif kind == "touch":
            self.memory.touch(*chain)
        elif kind == "promote":
            self.memory.promote(name)
        elif kind == "demote":
            self.memory.demote(name)
        elif kind == "flush":
            assert self.memory.flush(LONGEST_WAIT_S)
        elif kind == "damage":
            self.damage(number)
        elif kind == "wait" and self.loadings:
            await_loading(self.loadings[-1])

    def damage(self, number: int) -> None:
        for path in self.directory.glob("*" + SUFFIX):
            data = bytearray(path.read_bytes())
            if payload(number) in data:
                data[data.index(payload(number)) + 3] ^= 1
                path.write_bytes(data)

    def check_and_release(self, loading: Loading) -> None:
        await_loading(loading)
        for slot in loading.slots():
            number = int.from_bytes(slot.block, "big")
            assert bytes(slot.view()) == payload(number), "every block that comes back is the one that went"
            assert slot.parent == block(number - 1)
        loading.release()


def below(directory: Path, codec: CodecChoice) -> Sequence[LowerTier]:
    peer = PeerStore(InProcessPeer(3 * LAYOUT.nbytes), Compressor(LAYOUT, codec), LAYOUT.nbytes)
    disk = open_store(LocalFiles(directory), capacity_bytes=14_000, codec=codec)
    return LowerTier(peer, TierSpeed(1e9, 1e9)), LowerTier(disk, TierSpeed(1e8, 1e8))


@pytest.mark.parametrize("codec", ["none", "zstd"])
@settings(max_examples=40)
@given(steps=STEPS, slots=st.integers(1, 8), queue=st.integers(1, 6))
def test_random_histories(codec: CodecChoice, steps: list[tuple[str, int]], slots: int, queue: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        tiers = below(directory, codec)
        with open_memory(slots=slots, below=tiers, rules=GREEDY, max_queued_writes=queue, clock=Clock()) as memory:
            history = History(memory, directory)
            for kind, index in steps:
                history.apply(kind, index)
                memory.check_invariants()
            for loading in history.loadings:
                history.check_and_release(loading)
            for slot in history.reserved:
                memory.abandon(slot)
            assert memory.flush(LONGEST_WAIT_S)
            stats = memory.stats()
            assert all(tier.bytes <= tier.capacity_bytes for tier in stats.tiers)
            assert not any(info.pinned for tier in Tier for info in memory.blocks(tier, 100)), "no pin is left"
        assert not list(directory.glob("*.partial")), "no half-written file is left"
        LocalFiles(directory).close()  # nor the lock
