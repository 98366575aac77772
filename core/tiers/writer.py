"""Write-back: one thread that copies blocks a tier down, and makes room there first."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError

from core.tiers.loading import Hierarchy, log_failure
from core.tiers.lower_tier import LowerTier
from core.tiers.policy import MemoryOptions
from core.tiers.records import Tier
from core.tiers.write_back import Write, WritePace, WriteQueue


class Writer:
    """The queue of writes and its thread. Methods marked so are called under the hierarchy's lock."""

    def __init__(self, source: Hierarchy, options: MemoryOptions, lock: threading.Lock) -> None:
        self._source = source
        self._below: tuple[LowerTier, ...] = ()
        self._rules = options.rules
        self._lock = lock
        self._changed = threading.Condition(lock)
        self._queue = WriteQueue(options.max_queued_writes)
        self._pace = WritePace(options.write_bytes_s)
        self._hurry = threading.Event()
        self._scratch: dict[Tier, memoryview] = {}
        self._refused: dict[bytes, float] = {}  # blocks of host RAM that no tier took, with their heat then
        self._in_flight = 0
        self._closed = False
        self._seal_s = options.seal_s
        self._sealing: threading.Timer | None = None
        self.dropped = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vrm-memory-save")

    @property
    def queued(self) -> int:
        return len(self._queue) + self._in_flight

    def sink_to(self, below: tuple[LowerTier, ...]) -> None:
        """The tiers to write to from now on, fastest first. Waits for a write that runs."""
        self._thread.submit(setattr, self, "_below", below).result()

    def limit(self, bytes_s: float) -> None:
        """The rate while serving is no higher than this."""
        self._pace.bytes_s = min(bytes_s, self._pace.bytes_s or bytes_s)

    def offer(self, block: bytes, *, leave: bool) -> None:
        """Under the lock: write a block down some time, if that is worth it or it is to `leave`; never waits."""
        if self._closed or not self._wanted(block, leave=leave):
            return
        if not leave and self._refused.get(block) == self._source.heat.order(block):
            return
        is_new = block not in self._queue
        dropped = self._queue.offer(Write(block, self._source.heat.order(block), leave))
        if dropped is not None:
            self.dropped += 1
        elif is_new:
            self._thread.submit(self._write_next).add_done_callback(log_failure)

    def _wanted(self, block: bytes, *, leave: bool) -> bool:
        return (leave or self._is_warm(block)) and any(lower.store.accepting for lower in self._below)

    def _is_warm(self, block: bytes) -> bool:
        return self._source.score(block) >= self._rules.back_hotness

    def cancel(self, block: bytes) -> None:
        """Under the lock: the block has left; its write, if it was still queued, is dropped."""
        self._refused.pop(block, None)
        self.dropped += self._queue.cancel(block)

    # -- the thread -------------------------------------------------------------------------------------------------

    def _write_next(self) -> None:
        with self._lock:
            write = self._queue.take()
            slot = None if write is None else self._source.begin_write(write.block)
            if write is None or slot is None:
                self._changed.notify_all()
                return
            self._in_flight += 1
            is_below = any(write.block in lower.index for lower in self._below)
        written = False
        try:
            payload = None if is_below else self._source.parts.read(slot)
            if payload is not None:
                written = self._sink(0, slot.block, slot.parent, payload, asked=write.leave) is not None
        finally:
            with self._lock:
                self._in_flight -= 1
                if not written and not is_below:
                    self._refused[write.block] = self._source.heat.order(write.block)
                self._source.end_write(write.block, leave=write.leave)
                self._changed.notify_all()
        if written:
            self._seal_later()
            self._hurry.wait(self._pace.delay_s(self._source.layout.nbytes, time.monotonic()))

    def _sink(
        self, position: int, block: bytes, parent: bytes, payload: memoryview, *, asked: bool = False
    ) -> Tier | None:
        """Write a block to the first tier from `position` on that takes it, which is returned; where that one does not
        outlast the process, also to the first that does."""
        taken: Tier | None = None
        for place in range(position, len(self._below)):
            lower = self._below[place]
            with self._lock:
                wanted = (asked or self._is_warm(block)) and block not in lower.index
            if not wanted or not lower.store.accepting or (taken is not None and not lower.lasts):
                continue
            has_room = self._make_room(place, None if asked else block)
            if has_room and lower.write(block, parent, payload):
                with self._lock:
                    lower.index.add(block, parent)
                taken = taken or lower.tier
                if lower.lasts:
                    break
        return taken

    def _make_room(self, place: int, incoming: bytes | None) -> bool:
        """Let the coldest blocks of a tier sink to the next one, or go, until one more fits; False if none may go, or
        all are hotter than the `incoming` one."""
        lower = self._below[place]
        while not lower.store.has_room():
            with self._lock:
                victim = lower.index.coldest()
                if victim is None:
                    return False
                if incoming is not None and self._source.heat.order(victim) > self._source.heat.order(incoming):
                    return False
                parent = lower.index.parent(victim)
                lower.index.remove(victim)
            target = self._rescue(place, victim, parent)
            lower.store.drop(victim)
            with self._lock:
                self._source.moves["eviction" if target is None else "demotion", lower.tier, target] += 1
        return True

    def _rescue(self, place: int, block: bytes, parent: bytes) -> Tier | None:
        """The tier below that keeps a block which leaves this one; it is copied there if that is worth it."""
        deeper = self._below[place + 1 :]
        with self._lock:
            is_warm = self._is_warm(block)
            kept = next((lower.tier for lower in deeper if block in lower.index), None)
        if kept is not None or not is_warm or not any(lower.store.accepting for lower in deeper):
            return kept
        tier = self._below[place].tier
        if tier not in self._scratch:
            self._scratch[tier] = memoryview(bytearray(self._source.layout.nbytes))
        payload = self._scratch[tier]
        if not self._below[place].store.read(block, payload):
            return None
        return self._sink(place + 1, block, parent, payload)

    # -- ending -----------------------------------------------------------------------------------------------------

    def flush(self, blocks: Sequence[bytes], timeout_s: float) -> bool:
        """Write `blocks` in order and everything queued, at full speed, and sync. Waits up to `timeout_s` seconds."""
        deadline_s = time.monotonic() + timeout_s
        waiting = list(blocks)[::-1]
        self._hurry.set()
        try:
            with self._changed:
                self._refused.clear()
                while waiting or self.queued:
                    while waiting and len(self._queue) < self._queue.limit:
                        self.offer(waiting.pop(), leave=False)
                    if not self.queued:
                        continue
                    if not self._changed.wait(max(0.0, deadline_s - time.monotonic())):
                        return False
                if self._closed:
                    return False
                synced = self._thread.submit(self._sync)
            synced.result(max(0.0, deadline_s - time.monotonic()))
        except FutureTimeoutError:
            return False
        finally:
            if not self._closed:
                self._hurry.clear()
        return True

    def _seal_later(self) -> None:
        """What is written now is made lasting soon, so that a process that is killed loses little."""
        with self._lock:
            if self._sealing is None and not self._closed:
                timer = threading.Timer(self._seal_s, self._seal_now)
                timer.name, timer.daemon = "vrm-memory-seal", True
                timer.start()
                self._sealing = timer

    def _seal_now(self) -> None:
        with self._lock:
            self._sealing = None
            if not self._closed:
                self._thread.submit(self._sync).add_done_callback(log_failure)

    def _sync(self) -> None:
        for lower in self._below:
            lower.store.sync()

    def close(self) -> None:
        """Finish the write that runs, drop the others, end the thread."""
        with self._lock:
            self._closed = True
            sealing, self._sealing = self._sealing, None
            while self._queue.take() is not None:
                self.dropped += 1
            self._changed.notify_all()
        self._hurry.set()
        if sealing is not None:
            sealing.cancel()
            sealing.join()
        self._thread.shutdown()
