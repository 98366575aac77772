"""L3: slots of host RAM, and the index of the blocks in them."""

from __future__ import annotations

from collections.abc import Iterable

from core.devices import DeviceBudget
from core.devices.pinned import HostBuffer
from core.tiers.chain_index import ChainIndex
from core.tiers.hotness import HeatSpread, HeatTable
from core.tiers.parts import BlockParts, HostSlot
from core.tiers.records import Tier, TierSpeed, TierStats


class HostTier:
    """An arena `[num_slots, parts.slot_nbytes]` of bytes, on the ledger of main memory until `close`. Guarded by the
    hierarchy's lock.
    """

    PURPOSE = "kv_tiers"
    tier = Tier.L3

    def __init__(
        self,
        block_nbytes: int,
        parts: BlockParts,
        host_bytes: int,
        heat: HeatTable,
        budget: DeviceBudget,
        *,
        pin: bool,
        speed: TierSpeed | None,
    ) -> None:
        """Raises `ValueError` if no block fits, `OutOfDeviceMemoryError` if `budget` does not have the memory."""
        self.num_slots = parts.slots_in(host_bytes)
        if self.num_slots < 1:
            raise ValueError(f"{host_bytes} bytes of host RAM hold no block of {block_nbytes}")
        self._heat = heat
        self.index = ChainIndex(heat)
        self.slots: dict[bytes, HostSlot] = {}
        self.reserved: dict[bytes, HostSlot] = {}
        self.hits = self.misses = 0
        self._block_nbytes = block_nbytes
        self._machines = parts.machines
        self._speed = speed
        self._buffer = HostBuffer(self.PURPOSE, self.num_slots * parts.slot_nbytes, pin=pin, budget=budget)
        self._arena = self._buffer.memory.view(self.num_slots, parts.slot_nbytes)
        self._free = list(range(self.num_slots))[::-1]

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, block: bytes, parent: bytes) -> HostSlot:
        """A free slot for a block; the caller checks `num_free`."""
        index = self._free.pop()
        return HostSlot(block, parent, index, self._arena[index])

    def end_reservation(self, slot: HostSlot) -> None:
        """Raises `ValueError` for a slot that is not reserved."""
        if self.reserved.get(slot.block) is not slot:
            raise ValueError(f"slot {slot.index} is not reserved for block {slot.block.hex()}")
        del self.reserved[slot.block]

    def put_back(self, slot: HostSlot) -> None:
        """A slot that was taken is free again."""
        self._free.append(slot.index)

    def hold(self, slot: HostSlot) -> None:
        """A slot that was taken holds its block from now on."""
        self.index.add(slot.block, slot.parent)
        self.slots[slot.block] = slot

    def let_go(self, block: bytes) -> None:
        """Stop holding a block."""
        self.index.remove(block)
        self._free.append(self.slots.pop(block).index)

    def close(self) -> None:
        """Forget all blocks and give the memory back. Safe to call twice; nothing is taken from then on."""
        self.slots.clear()
        self.index = ChainIndex(self._heat)
        self.num_slots, self._free, self._arena = 0, [], self._arena[:0].clone()
        self._buffer.close()

    def stats(self, hotness: HeatSpread) -> TierStats:
        """Bytes are those of whole blocks, on whichever machines."""
        medium = "pinned" if self._buffer.is_pinned else "pageable"
        return TierStats(
            tier=self.tier,
            blocks=len(self.index),
            bytes=(self.num_slots - self.num_free) * self._block_nbytes,
            capacity_bytes=self.num_slots * self._block_nbytes,
            hits=self.hits,
            misses=self.misses,
            hotness=hotness,
            speed=self._speed,
            medium=medium if self._machines == 1 else f"of {self._machines} machines",
        )

    def check_invariants(self, filling: Iterable[HostSlot]) -> None:
        """Raise `AssertionError` unless every slot is in one state; `filling` are those being read into."""
        self.index.check_invariants()
        if set(self.slots) != set(self.index):
            raise AssertionError("blocks in host RAM and slots disagree")
        taken = [*self.slots.values(), *self.reserved.values(), *filling]
        if sorted([*self._free, *(slot.index for slot in taken)]) != list(range(self.num_slots)):
            raise AssertionError("a slot is lost, or in two states")
