"""What is to be written to the tier below, and how fast. Decisions only: the threads are the hierarchy's. No torch."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Write:
    """A block to write one tier down. With `leave` it gives up its slot afterwards (a demotion by call)."""

    block: bytes
    order: float
    leave: bool = False


class WriteQueue:
    """At most `limit` writes, first in first out. A full queue gives up its coldest write for a hotter one."""

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"a queue needs room for one write, got {limit}")
        self.limit = limit
        self._writes: OrderedDict[bytes, Write] = OrderedDict()

    def __len__(self) -> int:
        return len(self._writes)

    def __contains__(self, block: object) -> bool:
        return block in self._writes

    def offer(self, write: Write) -> bytes | None:
        """Queue a write and return the block whose write was dropped for it: None, another's or its own."""
        queued = self._writes.get(write.block)
        if queued is not None:
            self._writes[write.block] = Write(write.block, write.order, queued.leave or write.leave)
            return None
        if len(self._writes) < self.limit:
            self._writes[write.block] = write
            return None
        coldest = min(self._writes.values(), key=lambda queued: queued.order)
        if coldest.order >= write.order:
            return write.block
        del self._writes[coldest.block]
        self._writes[write.block] = write
        return coldest.block

    def take(self) -> Write | None:
        """The next write, or None."""
        return self._writes.popitem(last=False)[1] if self._writes else None

    def cancel(self, block: bytes) -> bool:
        """Forget the write of a block; whether there was one."""
        return self._writes.pop(block, None) is not None


class WritePace:
    """Bounds the bytes per second of a series of writes; `None` does not."""

    def __init__(self, bytes_s: float | None) -> None:
        self.bytes_s = bytes_s
        self._free_at_s = 0.0

    def delay_s(self, nbytes: int, now_s: float) -> float:
        """Seconds to wait after a write of `nbytes` that ended at `now_s`, so that the mean rate is kept."""
        if self.bytes_s is None:
            return 0.0
        self._free_at_s = max(self._free_at_s, now_s) + nbytes / self.bytes_s
        return self._free_at_s - now_s


class SpeedMeter:
    """Bytes per second over recent moves: an average weighted by bytes in which older moves fade."""

    FADE = 0.9

    def __init__(self, bytes_s: float | None = None) -> None:
        self._first = bytes_s
        self._totals = (0.0, 0.0)  # bytes and seconds, replaced together: threads may add at the same time
        self._lock = threading.Lock()

    def add(self, nbytes: int, seconds: float) -> None:
        with self._lock:
            moved, spent_s = self._totals
            self._totals = (moved * self.FADE + nbytes, spent_s * self.FADE + seconds)

    @property
    def bytes_s(self) -> float | None:
        """None until something is known."""
        moved, spent_s = self._totals
        return moved / spent_s if spent_s > 0 else self._first
