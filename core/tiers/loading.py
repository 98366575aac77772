"""Blocks on their way into slots of host RAM."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from core.logs import get_logger
from core.tiers.hotness import HeatTable
from core.tiers.parts import BlockParts, HostSlot
from core.tiers.records import BlockLayout, Move

logger = get_logger(__name__)


def log_failure(future: Future[None]) -> None:
    """Called when work of a thread is over: what it did not expect is reported, and the thread goes on."""
    error = future.exception()
    if error is not None:
        logger.error("memory worker failed", exc_info=error)


class Hierarchy(Protocol):
    """What `HierarchicalMemory` offers to the loader and the writer, for use under its lock."""

    layout: BlockLayout
    heat: HeatTable
    moves: Counter[Move]
    parts: BlockParts

    def take_slot(self, block: bytes, parent: bytes) -> HostSlot | None: ...

    def hold(self, slot: HostSlot) -> None: ...

    def begin_write(self, block: bytes) -> HostSlot | None: ...

    def end_write(self, block: bytes, *, leave: bool) -> None: ...

    def score(self, block: bytes) -> float: ...


class Loading:
    """A run of blocks on its way to host RAM; made by `HierarchicalMemory.load`.

    Every block that has arrived stays pinned in its slot until `release`. Any thread may ask.
    """

    def __init__(self, on_release: Callable[[Loading, int], None], on_done: Callable[[Loading], None] | None) -> None:
        self._on_release = on_release
        self._on_done = on_done
        self._finished = threading.Event()
        # The rest is written by the hierarchy alone, under its lock.
        self.blocks: list[bytes] = []
        self.arrived: dict[bytes, HostSlot] = {}
        self.pending = 0
        self.released = False

    def done(self) -> bool:
        """Whether every block has arrived or failed to."""
        return self._finished.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Until `done`, or so long; whether it is."""
        return self._finished.wait(timeout_s)

    def slots(self) -> list[HostSlot]:
        """The leading blocks that are there, in order. Before `done` this grows, so a caller may start with the head;
        a block that was damaged or had vanished ends it for good."""
        return [self.arrived[block] for block in itertools.takewhile(self.arrived.__contains__, self.blocks)]

    def release(self, restored: int = 0) -> None:
        """Unpin; `restored` is how many leading blocks were copied to the device (promotions from L3 to L1).

        Also allowed before `done`: what arrives later is not pinned for this loading. Again: nothing happens.
        """
        self._on_release(self, restored)

    def finish(self) -> None:
        """Tell whoever waits. Called once by the hierarchy, without its lock."""
        self._finished.set()
        if self._on_done is not None:
            self._on_done(self)
