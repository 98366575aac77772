"""What of a block is in host RAM of which machine: all of it here, or parts of it beside stages on other machines.

::

    a block's bytes      | layers 0-3 | layers 4-9             | layers 10-11 |
    slot 17 here         | layers 0-3 |                        | layers 10-11 |     one after the other
    slot 17 elsewhere                   layers 4-9

Slots have the same number on all machines. Stages fill them and read them by themselves; whole blocks, for the tiers
below, are put together here and divided here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True, eq=False)
class HostSlot:
    """A block's place in host RAM. `buffer` is its uint8 view of the arena (pinned if that is): what is
    kept here of the block."""

    block: bytes
    parent: bytes
    index: int
    buffer: torch.Tensor

    def view(self) -> memoryview:
        """The buffer's bytes without a copy."""
        return self.buffer.numpy().data


class RemoteParts(Protocol):
    """The parts of blocks that other machines keep."""

    num_slots: int
    """That all of them have."""

    @property
    def machines(self) -> int: ...

    def get(self, slot: int, block: bytes, payload: memoryview) -> bool:
        """Copy them to their places in a whole block's bytes; False if one is gone."""

    def put(self, slot: int, block: bytes, payload: memoryview) -> bool:
        """Copy them from there; False if one cannot be kept."""

    def close(self) -> None:
        """No machine keeps any. Safe to call twice."""


class BlockParts:
    """Blocks of `nbytes`, of which host RAM here has the bytes `here` and `remote` the others; None: none."""

    def __init__(self, nbytes: int, here: Sequence[slice] | None = None, remote: RemoteParts | None = None) -> None:
        self._nbytes = nbytes
        self._here = tuple(here) if here is not None else (slice(0, nbytes),)
        self._remote = remote
        self.slot_nbytes = sum(part.stop - part.start for part in self._here)

    @property
    def machines(self) -> int:
        """That have some of each block."""
        return (self.slot_nbytes > 0) + (self._remote.machines if self._remote is not None else 0)

    def slots_in(self, host_bytes: int) -> int:
        """Blocks that host RAM of that size here, and that of the other machines, hold."""
        counts = [] if self._remote is None else [self._remote.num_slots]
        if self.slot_nbytes:
            counts.append(host_bytes // self.slot_nbytes)
        return min(counts)

    def read(self, slot: HostSlot) -> memoryview | None:
        """All bytes of a block that has a slot, until that is used for another; None if a part is gone."""
        if self._remote is None:
            return slot.view()
        payload, kept, at = memoryview(bytearray(self._nbytes)), slot.view(), 0
        for part in self._here:
            end = at + part.stop - part.start
            payload[part], at = kept[at:end], end
        return payload if self._remote.get(slot.index, slot.block, payload) else None

    def fill(self, slot: HostSlot, read: Callable[[memoryview], bool]) -> bool:
        """Have `read` bring all bytes of a block, and put them where they belong; whether all are there."""
        if self._remote is None:
            return read(slot.view())
        payload, kept, at = memoryview(bytearray(self._nbytes)), slot.view(), 0
        if not read(payload):
            return False
        for part in self._here:
            end = at + part.stop - part.start
            kept[at:end], at = payload[part], end
        return self._remote.put(slot.index, slot.block, payload)

    def close(self) -> None:
        """Other machines keep no part any more."""
        if self._remote is not None:
            self._remote.close()
