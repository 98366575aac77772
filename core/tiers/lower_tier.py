"""One tier below host RAM as the hierarchy sees it: a store, the index of what is in it, counters. No torch."""

from __future__ import annotations

import threading
import time

from core.tiers.chain_index import ChainIndex
from core.tiers.hotness import HeatSpread, HeatTable
from core.tiers.records import BlockStore, Tier, TierSpeed, TierStats
from core.tiers.write_back import SpeedMeter


class LowerTier:
    """Everything but `write`, `read` and `drop` is guarded by the hierarchy's lock."""

    def __init__(self, store: BlockStore, speed: TierSpeed | None) -> None:
        self.store = store
        self.tier: Tier = store.tier
        self.hits = self.misses = self.damaged = 0
        self._latency_s = speed.latency_s if speed else 0.0
        self._reads = SpeedMeter(speed.read_bytes_s if speed else None)
        self._writes = SpeedMeter(speed.write_bytes_s if speed else None)
        self.index: ChainIndex

    def open_index(self, heat: HeatTable, now_s: float, lock: threading.Lock) -> None:
        """Index what the store still holds from before; each block counts as used once, now. The lock is taken for each
        by itself: nobody waits for all."""
        self.index = ChainIndex(heat)
        for block, parent in self.store.known():
            with lock:
                heat.meet(block, now_s)
                self.index.add(block, parent)

    @property
    def lasts(self) -> bool:
        """Whether what is there can be found again after the process has ended."""
        return self.tier is not Tier.L4

    @property
    def speed(self) -> TierSpeed | None:
        """As measured at start and on every block since; None until both directions are known."""
        read, write = self._reads.bytes_s, self._writes.bytes_s
        return TierSpeed(read or write or 0.0, write or read or 0.0, self._latency_s) if read or write else None

    def read(self, block: bytes, into: memoryview) -> bool:
        """Read a block and learn how fast that was."""
        started_s = time.perf_counter()
        found = self.store.read(block, into)
        if found:
            self._reads.add(len(into), max(time.perf_counter() - started_s, 1e-9))
        return found

    def write(self, block: bytes, parent: bytes, payload: memoryview) -> bool:
        """Write a block and learn how fast that was."""
        started_s = time.perf_counter()
        kept = self.store.write(block, parent, payload)
        if kept:
            self._writes.add(len(payload), max(time.perf_counter() - started_s, 1e-9))
        return kept

    def stats(self, hotness: HeatSpread) -> TierStats:
        return TierStats(
            tier=self.tier,
            blocks=len(self.index),
            bytes=self.store.used_bytes,
            capacity_bytes=self.store.capacity_bytes,
            hits=self.hits,
            misses=self.misses,
            hotness=hotness,
            speed=self.speed,
            medium=self.store.medium,
            codec=self.store.codec_name,
            stopped=self.store.stopped,
            damaged=self.damaged,
        )
