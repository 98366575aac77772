"""`HierarchicalMemory`: blocks of KV below VRAM, found by content.

::

    engine thread                      worker threads
    reserve -> copy in -> commit       write-back: L3 -> the tier below, that one's coldest -> the next
    find -> load -> copy out, release  loading: any tier below -> a slot of L3

Host RAM (L3) is an arena of slots, each in exactly one state::

    free       nobody's
    reserved   given out by `reserve`, being filled by the engine
    filling    being read from a tier below
    held       complete and indexed under its block's hash; pinned while somebody uses it

Tiers are inclusive: a block that is promoted keeps its copy below, so that it leaves host RAM without being written
again. Blocks hot enough are written down at once, others when they are about to leave (`WriteRules`). What cannot be
written in time is given up; the engine never waits.

One lock guards indexes, slots and counters; nothing is read or written while it is held.
"""

from __future__ import annotations

import heapq
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from core.devices import DeviceBudget
from core.tiers.host_tier import HostTier
from core.tiers.hotness import HeatTable
from core.tiers.loader import BlockLoader
from core.tiers.loading import Loading
from core.tiers.lower_tier import LowerTier
from core.tiers.parts import BlockParts, HostSlot
from core.tiers.policy import MemoryOptions
from core.tiers.records import BlockInfo, BlockLayout, MemoryStats, Move, Tier, TierSpeed
from core.tiers.writer import Writer

Clock = Callable[[], float]

PROMOTE_S = 30.0
"""That whoever brings a block up by hand waits for it; a slow store goes on afterwards."""
_MOST_AHEAD = 256
"""Blocks that are written down ahead of their leaving, at most a quarter of all: a burst of that many loses nothing."""


class HierarchicalMemory:
    """Blocks in host RAM and the tiers below it. Every method may be called from any thread and returns at once, except
    `flush` and `close`."""

    def __init__(
        self,
        layout: BlockLayout,
        options: MemoryOptions,
        host: DeviceBudget,
        *,
        host_speed: TierSpeed | None = None,
        clock: Clock = time.monotonic,
        parts: BlockParts | None = None,
    ) -> None:
        """`clock` gives seconds, for hotness alone. `parts` are given where other machines have parts of the blocks;
        they are closed with this.

        Raises `ValueError` if host RAM of that size holds no block, `OutOfDeviceMemoryError` if `host` has no room.
        """
        self.layout = layout
        self._options = options
        self._clock = clock
        self._lock = threading.Lock()
        self._adding = threading.Lock()
        self.heat = HeatTable(options.heat)
        self.parts = BlockParts(layout.nbytes) if parts is None else parts
        self._host = HostTier(
            layout.nbytes, self.parts, options.host_bytes, self.heat, host, pin=options.pin, speed=host_speed
        )
        self._below: tuple[LowerTier, ...] = ()
        self._missing: dict[Tier, str] = {}
        self.moves: Counter[Move] = Counter()
        self._unsaved = 0  # slots filled since what goes next was last looked at
        self._closed = False
        me = weakref.proxy(self)  # their threads end with `close`; without it they would keep each other alive
        self._loader = BlockLoader(me, self._host, self._lock)
        self._writer = Writer(me, options, self._lock)

    @property
    def num_slots(self) -> int:
        """Blocks that host RAM holds."""
        return self._host.num_slots

    @property
    def lasts(self) -> bool:
        """Whether any tier outlasts the process and takes blocks."""
        return any(lower.lasts and lower.store.accepting for lower in self._below)

    def add_below(self, below: Sequence[LowerTier], missing: Mapping[Tier, str] | None = None) -> None:
        """Tiers that are there from now on; all are put in the order of their speeds, blocks sink to the fastest first.
        `missing` are those that are not, and why."""
        for lower in below:
            lower.open_index(self.heat, self._clock(), self._lock)
        with self._adding:
            ordered = tuple(sorted([*self._below, *below], key=self._fetch_s))
            if below:
                self._writer.sink_to(ordered)
            with self._lock:
                self._below = self._loader.below = ordered
                self._missing |= missing or {}

    def limit_writes(self, bytes_s: float) -> None:
        """Write no faster than this while serving."""
        self._writer.limit(bytes_s)

    def _fetch_s(self, lower: LowerTier) -> float:
        return lower.speed.fetch_s(self.layout.nbytes) if lower.speed else 0.0

    def troubles(self) -> dict[Tier, str]:
        """Tiers that were asked for and are missing, or take no blocks at the moment, and why."""
        with self._lock:
            stopped = {lower.tier: lower.store.stopped for lower in self._below}
            return self._missing | {tier: reason for tier, reason in stopped.items() if reason is not None}

    # -- from VRAM to host RAM --------------------------------------------------------------------------------------

    def reserve(self, block: bytes, parent: bytes) -> HostSlot | None:
        """A slot to copy a block into, then `commit` or `abandon`; the coldest unpinned block makes room.

        None: host RAM has the block already (or is about to), or everything in it is in use.
        """
        with self._lock:
            if self._closed or block in self._host.index or block in self._host.reserved or block in self._loader.fills:
                return None
            slot = self.take_slot(block, parent)
            if slot is not None:
                self._host.reserved[block] = slot
            return slot

    def commit(self, slot: HostSlot) -> None:
        """The slot's content is complete: from now on the block is found. Counts as a demotion from L1."""
        with self._lock:
            self._host.end_reservation(slot)
            if slot.block in self._host.index or self._closed:  # it came up from a tier below in the meantime
                self._host.put_back(slot)
                return
            self.hold(slot)
            self.moves["demotion", Tier.L1, Tier.L3] += 1
            if self.score(slot.block) >= self._options.rules.through_hotness:
                self._writer.offer(slot.block, leave=False)
            self._clean_ahead()

    def abandon(self, slot: HostSlot) -> None:
        """Give a reserved slot back unused."""
        with self._lock:
            self._host.end_reservation(slot)
            self._host.put_back(slot)

    def _leave_host(self, block: bytes) -> None:
        """Free the slot of a block that may go."""
        copy = next((lower.tier for lower in self._below if block in lower.index), None)
        self.moves["eviction" if copy is None else "demotion", Tier.L3, copy] += 1
        self._writer.cancel(block)
        self._host.let_go(block)

    def _clean_ahead(self) -> None:
        """Write down what goes next, before its slot is needed: the coldest leaves and what they continue."""
        self._unsaved += 1
        margin = min(_MOST_AHEAD, self.num_slots // 4 + 1)
        if not self._below or self._host.num_free >= margin or self._unsaved < margin // 8:
            return
        self._unsaved = 0
        for leaf in self._host.index.coldest_leaves(min(32, margin)):
            block = leaf
            while margin > 0 and block in self._host.index:
                margin -= 1
                if not self._is_below(block):
                    self._writer.offer(block, leave=False)
                block = self._host.index.parent(block)

    def forget(self, tier: Tier, blocks: Iterable[bytes]) -> None:
        """Blocks that a tier has lost: they are found there no more. Counted as moves."""
        with self._lock:
            for lower in (lower for lower in self._below if lower.tier == tier):
                for block in [block for block in blocks if block in lower.index]:
                    lower.index.remove(block)
                    kept = next((other.tier for other in self._below if block in other.index), None)
                    self.moves["eviction" if kept is None else "demotion", tier, kept] += 1

    def _is_below(self, block: bytes) -> bool:
        return any(block in lower.index for lower in self._below)

    def _places(self) -> tuple[HostTier | LowerTier, ...]:
        """All tiers, nearest first."""
        return self._host, *self._below

    # -- finding and loading ----------------------------------------------------------------------------------------

    def find(self, blocks: Sequence[bytes], *, record: bool = True) -> list[Tier]:
        """The tiers that hold the longest leading run of `blocks`, the nearest for each.

        `record=False` leaves hits and misses alone: for asking again about a request that was asked about before.
        """
        tiers: list[Tier] = []
        with self._lock:
            for block in blocks:
                for place in self._places():
                    found = block in place.index
                    place.hits += record and found
                    place.misses += record and not found
                    if found:
                        tiers.append(place.tier)
                        break
                else:
                    break
        return tiers

    def held(self, blocks: Iterable[bytes]) -> set[bytes]:
        """Those of the blocks that some tier has; no lookup of theirs, and not a use."""
        with self._lock:
            return {block for block in blocks if block in self._host.index or self._is_below(block)}

    def load(self, blocks: Sequence[bytes], on_done: Callable[[Loading], None] | None = None) -> Loading:
        """Bring the leading run of `blocks` that some tier holds into host RAM and pin it there; a use of each block.

        The run is shorter where host RAM has no room left. `on_done` is called once, from a worker thread, or from this
        one if nothing has to be read; it must not raise. The caller releases the loading in every case.
        """
        loading = Loading(self._release, on_done)
        with self._lock:
            self._touch(blocks)
            done = self._closed or self._loader.claim(loading, blocks)
        if done:
            loading.finish()
        return loading

    def _release(self, loading: Loading, restored: int) -> None:
        with self._lock:
            if loading.released or self._closed:
                return
            self._loader.release(loading)
            self.moves["promotion", Tier.L3, Tier.L1] += restored
            self._clean_ahead()

    # -- by call ----------------------------------------------------------------------------------------------------

    def touch(self, *blocks: bytes) -> None:
        """Count a use of blocks, wherever they are: a prefix hit in VRAM also makes them hot here. Of one not known
        yet, computing it was the first."""
        with self._lock:
            now_s = self._clock()
            for block in blocks:
                self.heat.meet(block, now_s)
            self._touch(blocks)

    def _touch(self, blocks: Iterable[bytes]) -> None:
        now_s = self._clock()
        for block in blocks:
            self.heat.use(block, now_s)
            self._host.index.requeue(block)
            for lower in self._below:
                lower.index.requeue(block)

    def promote(self, block: bytes) -> bool:
        """Bring a block to host RAM, by itself, and wait for it, or `PROMOTE_S`; False if it is there already, nowhere,
        damaged, or there is no room."""
        if block in self._host.index:
            return False
        loading = self.load([block])
        try:
            return bool(loading.slots() if loading.wait(PROMOTE_S) else loading.blocks)
        finally:
            loading.release()

    def demote(self, block: bytes) -> bool:
        """Send a block of host RAM, with all that continues it there, to the tier below; False if it is not there, in
        use, or nothing below takes it."""
        with self._lock:
            if block not in self._host.index or not any(lower.store.accepting for lower in self._below):
                return False
            chain = self._host.index.with_descendants(block)
            if any(self._host.index.is_pinned(member) for member in chain):
                return False
            for member in chain:
                if self._is_below(member) and self._host.index.is_evictable(member):
                    self._leave_host(member)
                else:
                    self._writer.offer(member, leave=True)
            return True

    # -- what loader and writer ask for, under the lock -------------------------------------------------------------

    def take_slot(self, block: bytes, parent: bytes) -> HostSlot | None:
        """A slot, for which the coldest block leaves if need be; None if none may leave."""
        if not self._host.num_free:
            victim = self._host.index.coldest()
            if victim is None:
                return None
            self._leave_host(victim)
        return self._host.take(block, parent)

    def hold(self, slot: HostSlot) -> None:
        """A slot's content is complete."""
        self.heat.meet(slot.block, self._clock())
        self._host.hold(slot)

    def begin_write(self, block: bytes) -> HostSlot | None:
        """The slot of a block that is to be written, pinned; None if it has left."""
        slot = self._host.slots.get(block)
        if slot is not None:
            self._host.index.pin(block)
        return slot

    def end_write(self, block: bytes, *, leave: bool) -> None:
        """The write is over."""
        self._host.index.unpin(block)
        if leave and self._host.index.is_evictable(block) and self._is_below(block):
            self._leave_host(block)
        self._clean_ahead()

    def score(self, block: bytes) -> float:
        return self.heat.score(block, self._clock())

    # -- looking and ending -----------------------------------------------------------------------------------------

    def stats(self) -> MemoryStats:
        """A snapshot of every tier and counter."""
        tiers = self._places()
        with self._lock:
            held = [list(tier.index) for tier in tiers]
            moves = dict(self.moves)
            queued, dropped = self._writer.queued, self._writer.dropped
        now_s = self._clock()
        spreads = [self.heat.spread(blocks, now_s) for blocks in held]
        stats = tuple(tier.stats(spread) for tier, spread in zip(tiers, spreads, strict=True))
        return MemoryStats(stats, moves, queued, dropped)

    def speeds(self) -> dict[Tier, TierSpeed]:
        """What every tier below host RAM does, where that is known: what `worth_restoring` needs."""
        return {lower.tier: lower.speed for lower in self._below if lower.speed is not None}

    def blocks(self, tier: Tier, limit: int) -> list[BlockInfo]:
        """The `limit` hottest blocks of a tier, hottest first; none for a tier that is not there."""
        with self._lock:
            indexes = [place.index for place in self._places() if place.tier == tier]
            held = [(block, index.is_pinned(block)) for index in indexes for block in index]
        now_s = self._clock()
        infos = (BlockInfo(block, self.heat.score(block, now_s), pinned) for block, pinned in held)
        return heapq.nlargest(limit, infos, key=lambda info: info.hotness)

    def flush(self, timeout_s: float) -> bool:
        """Write down every block of host RAM that is worth it and nowhere below, at full speed, and make it last.

        Waits; False if that took longer than `timeout_s` seconds.
        """
        with self._lock:
            unsaved = [block for block in self._host.index.parents_first() if not self._is_below(block)]
        return self._writer.flush(unsaved, timeout_s)

    def close(self) -> None:
        """Finish what is being read, drop queued writes, end the threads, close the tiers below and give host RAM back.
        Safe to repeat; slots are used no more."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._loader.close()
        self._writer.close()
        for lower in self._below:
            lower.store.close()
        self.parts.close()
        with self._lock:
            self._host.close()

    def check_invariants(self) -> None:
        """Raise `AssertionError` unless every slot is in one state and all indexes agree."""
        with self._lock:
            self._host.check_invariants([fill.slot for fill in self._loader.fills.values()])
            for lower in self._below:
                lower.index.check_invariants()
