"""Small blocks with contents that can be told apart, and memories that are audited and closed."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from steering import LONGEST_WAIT_S, until

from core.devices import DeviceBudget, host_device
from core.tiers import BlockLayout, HierarchicalMemory, Tier
from core.tiers.compress import CodecChoice, Compressor
from core.tiers.hotness import HeatModel
from core.tiers.loading import Loading
from core.tiers.lower_tier import LowerTier
from core.tiers.parts import HostSlot
from core.tiers.policy import MemoryOptions, WriteRules
from core.tiers.records import Quantization
from core.tiers.segment_store import SegmentStore
from core.tiers.segments import Identity, SegmentFiles

LAYOUT = BlockLayout.of([(2, 8, 8)] * 2, block_size=4, dtype="bfloat16")
GREEDY = WriteRules(through_hotness=0.0, back_hotness=0.0)
"""Every block is written down at once."""


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def block(number: int) -> bytes:
    return number.to_bytes(16, "big")


def payload(number: int, layout: BlockLayout = LAYOUT) -> bytes:
    return random.Random(number).randbytes(layout.nbytes)


def fill(slot: HostSlot, number: int) -> None:
    slot.view()[:] = payload(number)


def save(memory: HierarchicalMemory, number: int, parent: int) -> bool:
    """Reserve, fill and commit; whether there was room."""
    slot = memory.reserve(block(number), block(parent))
    if slot is None:
        return False
    fill(slot, number)
    memory.commit(slot)
    return True


def save_chain(memory: HierarchicalMemory, length: int, first: int = 1) -> None:
    """Blocks `first ..`, each the next one's parent; every write-back is waited for."""
    for number in range(first, first + length):
        assert save(memory, number, number - 1 if number > first else 0)
        assert memory.flush(LONGEST_WAIT_S)


def await_loading(*loadings: Loading) -> None:
    for loading in loadings:
        until(loading.done, "every block has arrived, or failed to")


def load_bytes(memory: HierarchicalMemory, blocks: Sequence[bytes]) -> list[bytes]:
    """What a load brings, in order."""
    loading = memory.load(blocks)
    await_loading(loading)
    found = [bytes(slot.view()) for slot in loading.slots()]
    loading.release()
    return found


@contextmanager
def open_memory(
    *,
    slots: int,
    below: Sequence[LowerTier] = (),
    clock: Clock | None = None,
    rules: WriteRules | None = None,
    max_queued_writes: int = 64,
    write_bytes_s: float | None = None,
    half_life_s: float = 100.0,
    seal_s: float = 30.0,
) -> Iterator[HierarchicalMemory]:
    options = MemoryOptions(
        host_bytes=slots * LAYOUT.nbytes,
        heat=HeatModel(half_life_s),
        rules=rules or WriteRules(),
        max_queued_writes=max_queued_writes,
        write_bytes_s=write_bytes_s,
        seal_s=seal_s,
    )
    host = DeviceBudget(host_device(slots * LAYOUT.nbytes))
    memory = HierarchicalMemory(LAYOUT, options, host, clock=clock or Clock())
    memory.add_below(below)
    try:
        yield memory
        memory.check_invariants()
    finally:
        memory.close()
        assert host.used_by_purpose() == {}


class InProcessPeer:
    """A peer in this process, which keeps the bytes. Thread-safe."""

    name = "in-process"

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._lock = threading.Lock()
        self._data: dict[bytes, bytes] = {}

    def has_room(self, nbytes: int) -> bool:
        return self.used_bytes + nbytes <= self.capacity_bytes

    def put(self, block: bytes, data: memoryview) -> bool:
        with self._lock:
            grown = self.used_bytes + len(data) - len(self._data.get(block, b""))
            if grown > self.capacity_bytes:
                return False
            self._data[block] = bytes(data)
            self.used_bytes = grown
            return True

    def get(self, block: bytes) -> bytes | None:
        with self._lock:
            return self._data.get(block)

    def drop(self, block: bytes) -> None:
        with self._lock:
            self.used_bytes -= len(self._data.pop(block, b""))

    def close(self) -> None:
        with self._lock:
            self._data.clear()
            self.used_bytes = 0


IDENTITY = Identity(salt="00", layout=LAYOUT.digest(), block_nbytes=LAYOUT.nbytes, quantization="none")
DISK_BYTES = 64 * 1024


def open_store(
    files: SegmentFiles,
    *,
    identity: Identity = IDENTITY,
    capacity_bytes: int = DISK_BYTES,
    min_free_bytes: int = 0,
    codec: CodecChoice = "none",
    clock: Clock | None = None,
) -> SegmentStore:
    quantization: Quantization = "int8" if identity.quantization == "int8" else "none"
    compressor = Compressor(LAYOUT, codec, quantization)
    return SegmentStore(
        Tier.L5, files, capacity_bytes, identity, compressor, min_free_bytes=min_free_bytes, clock=clock or Clock()
    )


def put(store: SegmentStore, *numbers: int) -> None:
    """Write blocks into a store; each the child of the number below it."""
    for number in numbers:
        assert store.write(block(number), block(number - 1), memoryview(bytearray(payload(number))))


def get(store: SegmentStore, number: int) -> bytes | None:
    into = bytearray(LAYOUT.nbytes)
    return bytes(into) if store.read(block(number), memoryview(into)) else None
