"""A worker's main memory for blocks of KV: parts of blocks beside the stages that it computes (L3), and whole blocks
that its master has no room for (L4). Each is a *memory* with a number of its own on the `blocks` link.

Parts lie in slots that the master numbers. Stages fill and read them in steps, the master reads and fills them for the
tiers below. It is the master that sees to it that nobody reads a slot while another writes it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias

import torch

from core.cluster.block_wire import HEAD_BYTES, BlockRef, read_pages, read_wanted, send_answer
from core.config import Settings
from core.devices import DeviceBudget
from core.devices.pinned import HostBuffer
from core.errors import InvalidRequestError, NetworkError, ProtocolError
from core.kv_cache.page_ops import PageLoad, PageSave
from core.network.frames import Header, Opcode
from core.network.link import Link
from core.tiers.host_tier import HostTier
from core.tiers.opening import AUTOMATIC_SHARE

Lost: TypeAlias = Callable[[NetworkError], None]

LENT = "kv_lent"
"""On the ledger of main memory: what the master may keep here, whether or not it does."""


class Memory(Protocol):
    """What the master reaches by a number."""

    @property
    def largest_bytes(self) -> int:
        """Of a block, or of its part."""

    def put(self, ref: BlockRef, data: memoryview) -> bool: ...

    def get(self, ref: BlockRef) -> memoryview | None: ...

    def drop(self, ref: BlockRef) -> None: ...

    def close(self) -> None: ...


class StageParts:
    """One stage's parts of blocks, uint8 `[slots, part_bytes]`: none until `open`. See `BlockBuffers`."""

    def __init__(self) -> None:
        self._buffer: HostBuffer | None = None
        self._arena = torch.empty(0, 0, dtype=torch.uint8)
        self._blocks: dict[int, bytes] = {}

    def open(self, slots: int, part_bytes: int, budget: DeviceBudget, *, pin: bool) -> None:
        """Raises `OutOfDeviceMemoryError`, and `InvalidRequestError` if it is open."""
        if self._buffer is not None:
            raise InvalidRequestError("the stage has memory for blocks already")
        self._buffer = HostBuffer(HostTier.PURPOSE, slots * part_bytes, pin=pin, budget=budget)
        self._arena = self._buffer.memory.view(slots, part_bytes)

    @property
    def largest_bytes(self) -> int:
        return self._arena.shape[1]

    def place(self, op: PageSave | PageLoad) -> torch.Tensor:
        """See `BlockBuffers`. A slot that holds another block than the one that is to be loaded is not there."""
        if op.slot >= len(self._arena) or op.slot < 0:
            raise KeyError(f"there is no slot {op.slot}")
        if isinstance(op, PageSave):
            self._blocks[op.slot] = op.block_hash
        elif self._blocks.get(op.slot) != op.block_hash:
            raise KeyError(f"slot {op.slot} does not hold block {op.block_hash.hex()}")
        return self._arena[op.slot]

    def put(self, ref: BlockRef, data: memoryview) -> bool:
        if ref.slot >= len(self._arena) or len(data) != self.largest_bytes:
            return False
        self._arena[ref.slot].numpy()[:] = data
        self._blocks[ref.slot] = ref.block
        return True

    def get(self, ref: BlockRef) -> memoryview | None:
        if self._blocks.get(ref.slot) != ref.block:
            return None
        return self._arena[ref.slot].numpy().data

    def drop(self, ref: BlockRef) -> None:
        if self._blocks.get(ref.slot) == ref.block:
            del self._blocks[ref.slot]

    def close(self) -> None:
        self._blocks.clear()
        self._arena = torch.empty(0, 0, dtype=torch.uint8)
        if self._buffer is not None:
            self._buffer.close()
            self._buffer = None


class _Room:
    """Bytes that the master may use here, together in all memories that it has been lent."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.used = 0
        self._lock = threading.Lock()

    def change(self, by: int) -> bool:
        """Whether there is room for so many more; then they are used."""
        with self._lock:
            if self.used + by > self.nbytes:
                return False
            self.used += by
            return True


class LentBlocks:
    """Whole blocks, as they have come. Used by one thread at a time."""

    def __init__(self, room: _Room) -> None:
        self._room = room
        self._data: dict[bytes, memoryview] = {}

    @property
    def largest_bytes(self) -> int:
        return self._room.nbytes

    def put(self, ref: BlockRef, data: memoryview) -> bool:
        if not self._room.change(len(data) - len(self._data.get(ref.block, b""))):
            return False
        self._data[ref.block] = data
        return True

    def get(self, ref: BlockRef) -> memoryview | None:
        return self._data.get(ref.block)

    def drop(self, ref: BlockRef) -> None:
        self._room.change(-len(self._data.pop(ref.block, b"")))

    def close(self) -> None:
        self._room.change(-sum(map(len, self._data.values())))
        self._data = {}


class KeptBlocks:
    """All memories of one session. `budget` is main memory's ledger, on which what may be lent is already; `has_cards`:
    not every device here is main memory itself."""

    def __init__(self, settings: Settings, budget: DeviceBudget, *, has_cards: bool) -> None:
        self.memories: dict[int, Memory] = {}
        self._asked = settings.memory.host_bytes
        self._budget = budget
        self._has_cards = has_cards
        self._room = _Room(settings.cluster.memory_bytes)

    @property
    def keeps_bytes(self) -> int:
        """Main memory for the parts of an engine that is being loaded."""
        free = self._budget.free_bytes
        if self._asked is not None:
            return min(self._asked, free)
        return int(free * AUTOMATIC_SHARE) if self._has_cards else 0

    @property
    def lent_bytes(self) -> int:
        """That the master's blocks take."""
        return self._room.used

    def keep(self, number: int, parts: StageParts, slots: int, part_bytes: int, *, pin: bool) -> None:
        """A memory for the parts of a stage. Raises `OutOfDeviceMemoryError`, `InvalidRequestError`."""
        self._check_free(number)
        parts.open(slots, part_bytes, self._budget, pin=pin)
        self.memories[number] = parts

    def lend(self, number: int) -> int:
        """A memory for whole blocks; how many bytes all of these may have together. Raises `InvalidRequestError`."""
        self._check_free(number)
        self.memories[number] = LentBlocks(self._room)
        return self._room.nbytes

    def _check_free(self, number: int) -> None:
        if number in self.memories:
            raise InvalidRequestError(f"memory {number} is there already")

    def release(self, number: int) -> None:
        """One that is not there is none any more."""
        memory = self.memories.pop(number, None)
        if memory is not None:
            memory.close()

    def close(self) -> None:
        """There is no master any more."""
        for number in list(self.memories):
            self.release(number)


class BlocksEnd:
    """A worker's end of its `blocks` link: a `LinkHandler`. `on_lost` hears of its end."""

    def __init__(self, memories: Mapping[int, Memory], on_lost: Lost) -> None:
        self._memories = memories
        self._on_lost = on_lost
        self._link: Link | None = None

    def attach(self, link: Link) -> None:
        """The link that this is an end of, before it starts."""
        self._link = link

    def buffer_for(self, header: Header) -> memoryview | None:
        """See `LinkHandler`."""
        if header.opcode is Opcode.KV_WANTED:
            return None
        if header.opcode is not Opcode.KV_PAGES:
            raise ProtocolError(f"{header.opcode.name} is not taken here")
        memory = self._memories.get(header.layer)
        if memory is None:
            raise ProtocolError(f"KV_PAGES for memory {header.layer}, which is not there")
        if header.nbytes > HEAD_BYTES + memory.largest_bytes:
            raise ProtocolError(f"KV_PAGES of {header.nbytes} bytes are more than memory {header.layer} keeps")
        return None

    def received(self, header: Header, payload: memoryview) -> bool:
        """See `LinkHandler`. Answers at once: this thread waits for nothing else."""
        assert self._link is not None
        memory, found = self._memories.get(header.layer), None
        if header.opcode is Opcode.KV_PAGES:
            ref, data = read_pages(payload)
            done = memory is not None and memory.put(ref, data)
        else:
            ref = read_wanted(payload)
            if ref.lets_go and memory is not None:
                memory.drop(ref)
            elif memory is not None:
                found = memory.get(ref)
            done = ref.lets_go or found is not None
        send_answer(self._link, header.layer, header.step, done=done, data=b"" if found is None else found)
        return True

    def lost(self, error: NetworkError) -> None:
        """See `LinkHandler`."""
        self._on_lost(error)
