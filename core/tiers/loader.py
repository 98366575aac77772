"""Promotion: threads that read blocks of the tiers below into slots of host RAM."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from core.tiers.host_tier import HostTier
from core.tiers.loading import Hierarchy, Loading, log_failure
from core.tiers.lower_tier import LowerTier
from core.tiers.parts import HostSlot
from core.tiers.records import Tier

_THREADS = 2


@dataclass(slots=True, eq=False)
class Fill:
    """A block that is being read into a slot, and who waits for it."""

    slot: HostSlot
    source: LowerTier
    waiting: list[Loading] = field(default_factory=list)


class BlockLoader:
    """Blocks on their way up. Its methods are called under the hierarchy's lock, but for `close`."""

    def __init__(self, target: Hierarchy, host: HostTier, lock: threading.Lock) -> None:
        self.fills: dict[bytes, Fill] = {}
        self.below: tuple[LowerTier, ...] = ()
        self._target = target
        self._host = host
        self._lock = lock
        self._closed = False
        self._waiting: deque[Fill] = deque()  # not being read yet
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="vrm-memory-load")

    def claim(self, loading: Loading, blocks: Sequence[bytes]) -> bool:
        """Pin the leading run of `blocks` that is in host RAM or can come there, and start reading what is missing.
        Whether there is nothing to wait for."""
        # What is here is pinned first, so that making room for the rest does not push it out.
        held = dict.fromkeys(block for block in blocks if block in self._host.index)
        for block in held:
            self._host.index.pin(block)
        for block in dict.fromkeys(blocks):
            if not self._claim_one(loading, block, held):
                break
            loading.blocks.append(block)
        for block in held:
            if block not in loading.arrived:
                self._host.index.unpin(block)
        # One task per thread, not per block: handing tasks over costs the caller more than the rest of this.
        for _ in range(min(_THREADS, len(self._waiting))):
            self._start()
        return loading.pending == 0

    def _claim_one(self, loading: Loading, block: bytes, held: dict[bytes, None]) -> bool:
        while block not in self._host.index:
            if self._await_fill(loading, block):
                return True
            last = next(reversed(held), None)
            if last is None or last in loading.arrived or self.source(block) is None:
                return False
            del held[last]
            self._host.index.unpin(last)  # room is worth more at the head of the run than at its tail
        if block not in held:
            self._host.index.pin(block)
        loading.arrived[block] = self._host.slots[block]
        return True

    def source(self, block: bytes) -> LowerTier | None:
        """The nearest tier below host RAM that holds a block."""
        return next((lower for lower in self.below if block in lower.index), None)

    def _await_fill(self, loading: Loading, block: bytes) -> bool:
        """Join the reading of a block, or start it; False if it is nowhere, or there is no room."""
        fill = self.fills.get(block)
        if fill is None:
            lower = self.source(block)
            slot = self._target.take_slot(block, lower.index.parent(block)) if lower is not None else None
            if lower is None or slot is None:
                return False
            lower.index.pin(block)
            fill = self.fills[block] = Fill(slot, lower)
            self._waiting.append(fill)
        fill.waiting.append(loading)
        loading.pending += 1
        return True

    def _start(self) -> None:
        self._threads.submit(self._fill_waiting).add_done_callback(self._task_over)

    def _task_over(self, task: Future[None]) -> None:
        """One block's unexpected failure has ended a task; the blocks behind it are read all the same."""
        log_failure(task)
        if task.exception() is not None:
            with self._lock:
                if not self._closed:
                    self._start()

    def _fill_waiting(self) -> None:
        """In a thread: read blocks until none waits."""
        while True:
            try:
                fill = self._waiting.popleft()
            except IndexError:
                return
            arrived = False
            try:
                arrived = self._target.parts.fill(fill.slot, partial(fill.source.read, fill.slot.block))
            finally:  # whatever happens, nobody waits for ever
                self._finish([fill], arrived=arrived)

    def _finish(self, fills: Sequence[Fill], *, arrived: bool) -> None:
        with self._lock:
            finished = [loading for fill in fills for loading in self._settle(fill, arrived=arrived)]
        for loading in finished:
            loading.finish()

    def _settle(self, fill: Fill, *, arrived: bool) -> list[Loading]:
        """Index a block that was read, or forget one that could not be; returns the loadings that are complete."""
        block, lower = fill.slot.block, fill.source
        del self.fills[block]
        lower.index.unpin(block)
        if not arrived:
            lower.damaged += 1
            if block in lower.index:
                lower.index.remove(block)
        if arrived and block not in self._host.index:
            self._target.hold(fill.slot)
            self._target.moves["promotion", lower.tier, Tier.L3] += 1
        else:
            self._host.put_back(fill.slot)
        finished = []
        for loading in fill.waiting:
            loading.pending -= 1
            if block in self._host.index and not loading.released:
                self._host.index.pin(block)
                loading.arrived[block] = self._host.slots[block]
            if loading.pending == 0:
                finished.append(loading)
        return finished

    def release(self, loading: Loading) -> None:
        """Unpin what has arrived for a loading."""
        loading.released = True
        for block in loading.arrived:
            self._host.index.unpin(block)

    def close(self) -> None:
        """Finish what is being read and end the threads. Waits; nothing may be claimed any more."""
        with self._lock:
            self._closed = True
        self._threads.shutdown()
        self._finish(list(self._waiting), arrived=False)
