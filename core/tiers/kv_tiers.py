"""`KVTiers`: blocks that leave the devices go to the tiers below, and come back when a prompt begins like theirs.

Content is found by its chained hash. A block whose id is about to be reused is saved first; the save is part of the
step that reuses it. A sequence whose prefix goes on below is not started before that is in main memory (others go
ahead), and its blocks are then loaded layer by layer while the first layers compute. A preempted one comes back alike.

What is asked for again and again never leaves the devices by itself. So that a restart does not lose just that, blocks
are also copied down when they are used a second time, and when the engine ends.

Restoring has to beat computing; `worth` decides, on measured speeds. Called by the engine thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from core.kv_cache.companions import Tiers
from core.kv_cache.manager import KVCacheManager
from core.kv_cache.page_ops import PageLoad, PageSave
from core.tiers.hierarchy import HierarchicalMemory
from core.tiers.loading import Loading
from core.tiers.parts import HostSlot
from core.tiers.records import Tier

Worth = Callable[[int, Sequence[Tier]], int]
"""Of a run of blocks behind `known` blocks, in these tiers: how many leading ones to restore."""
_COPIES_AT_ONCE = 16
"""Blocks of one prompt that are copied down beside a step; the rest of them at the next use."""


@dataclass(slots=True)
class _StepUse:
    """What the step being gathered, or one in flight, does with slots."""

    saves: list[HostSlot] = field(default_factory=list)
    loads: list[tuple[Loading, Sequence[bytes]]] = field(default_factory=list)


class StepBlocks:
    """Main memory of the blocks that steps in flight save or load, by hash: where stages find it. Written by the engine
    thread, read by the stages'."""

    def __init__(self) -> None:
        self._held: dict[bytes, tuple[torch.Tensor, int]] = {}

    def hold(self, digest: bytes, buffer: torch.Tensor) -> None:
        """A step uses the block from now on."""
        _, uses = self._held.get(digest, (buffer, 0))
        self._held[digest] = (buffer, uses + 1)

    def drop(self, digest: bytes) -> None:
        """A step no longer does."""
        buffer, uses = self._held.pop(digest)
        if uses > 1:
            self._held[digest] = (buffer, uses - 1)

    def clear(self) -> None:
        """No step uses any."""
        self._held.clear()

    def place(self, op: PageSave | PageLoad) -> torch.Tensor:
        """See `BlockBuffers`."""
        return self._held[op.block_hash][0]


class KVTiers(Tiers):
    """The tiers below the devices of one engine. They have threads of their own: nothing is to do between steps."""

    def __init__(
        self, kv: KVCacheManager, memory: HierarchicalMemory, worth: Worth, buffers: StepBlocks | None = None
    ) -> None:
        self.memory = memory
        self._kv = kv
        self._worth = worth
        self._prefetches: dict[int, tuple[int, Loading]] = {}  # by sequence, from which block of its table on
        self.buffers = buffers if buffers is not None else StepBlocks()
        self._now = _StepUse()
        self._steps: dict[int, _StepUse] = {}

    # -- out --------------------------------------------------------------------------------------------------------

    def save(self, block: int, digest: bytes, parent: bytes | None) -> None:
        """The block's id is about to be reused."""
        slot = self.memory.reserve(digest, parent or b"")
        if slot is not None:
            self._kv.pages.save(block, digest, slot.index)
            self.buffers.hold(digest, slot.buffer)
            self._now.saves.append(slot)

    def reused(self, blocks: Sequence[int], digests: Sequence[bytes]) -> None:
        """A prompt begins with these blocks, which the devices have: a use of each."""
        self.memory.touch(*digests)
        if self.memory.lasts:
            self._copy_down(blocks, digests, _COPIES_AT_ONCE)

    def _copy_down(self, blocks: Sequence[int], digests: Sequence[bytes], most: int) -> int:
        """Save the first `most` of the blocks that no tier has; how many those were."""
        held = self.memory.held(digests)
        lacking = [(block, digest) for block, digest in zip(blocks, digests, strict=True) if digest not in held]
        for block, digest in lacking[:most]:
            self.save(block, digest, self._kv.pool.parent_of(digest))
        return len(lacking[:most])

    def keep(self, move: Callable[[], bool], timeout_s: float) -> None:
        """The engine ends: write down what only the devices have, last used first, where it outlasts them.

        `move` does what was gathered for a step, and says whether that went well.
        """
        deadline_s = time.monotonic() + timeout_s
        blocks = self._kv.pool.cached_blocks()[::-1] if self.memory.lasts else []
        digests = [digest for block in blocks if (digest := self._kv.pool.hash_of(block)) is not None]
        at_once = max(1, self.memory.num_slots // 2)
        for first in range(0, len(blocks), at_once):
            part = slice(first, first + at_once)
            if not self._copy_down(blocks[part], digests[part], at_once):
                continue
            if not move() or not self.memory.flush(deadline_s - time.monotonic()):
                return

    # -- in ---------------------------------------------------------------------------------------------------------

    def prefetch(self, seq_id: int, known: int, hashes: Sequence[bytes], on_done: Callable[[], Any]) -> bool:
        """Ask for what follows the `known` blocks that the devices have. True: `on_done` will be called, from another
        thread, once it is in main memory; False: nothing to wait for.
        """
        self.cancel(seq_id)
        run = hashes[known:]
        tiers = self.memory.find(run)
        count = self._worth(known, tiers) if tiers else 0
        if not count:
            return False
        waits: list[bool] = []

        def done(loading: Loading) -> None:
            if waits:
                on_done()

        loading = self.memory.load(run[:count], done)
        self._prefetches[seq_id] = known, loading
        if loading.done():
            return False
        waits.append(True)
        if loading.done():  # it may have arrived before `done` could see that somebody waits
            on_done()
        return True

    def take(self, seq_id: int, known: int) -> tuple[list[bytes], Loading] | None:
        """The hashes of what has been fetched for the blocks of a sequence from number `known` on."""
        if seq_id not in self._prefetches:
            return None
        first, loading = self._prefetches.pop(seq_id)
        slots = loading.slots()[max(0, known - first) :]
        if known < first or not slots:
            loading.release()
            return None
        return [slot.block for slot in slots], loading

    def loaded(self, loading: Loading, digests: Sequence[bytes], blocks: Sequence[int]) -> None:
        """These blocks of a loading are copied, to these of the devices, by the step being gathered."""
        for digest, block in zip(digests, blocks, strict=True):
            slot = loading.arrived[digest]
            self._kv.pages.load(digest, block, slot.index)
            self.buffers.hold(digest, slot.buffer)
        self._now.loads.append((loading, digests))

    def cancel(self, seq_id: int) -> None:
        """A sequence no longer wants what it asked for."""
        if seq_id in self._prefetches:
            self._prefetches.pop(seq_id)[1].release()

    # -- steps ------------------------------------------------------------------------------------------------------

    def step_taken(self, step: int) -> None:
        """What was gathered so far is part of this step."""
        if self._now.saves or self._now.loads:
            self._steps[step], self._now = self._now, _StepUse()

    def step_done(self, step: int, moved: bool) -> None:
        """Saved blocks can be found from now on, loaded ones need their slots no more."""
        for number in [number for number in self._steps if number <= step]:
            use = self._steps.pop(number)
            for slot in use.saves:
                self.buffers.drop(slot.block)
                (self.memory.commit if moved else self.memory.abandon)(slot)
            for loading, digests in use.loads:
                for digest in digests:
                    self.buffers.drop(digest)
                loading.release(len(digests) if moved else 0)

    def close(self, flush_s: float = 10.0) -> None:
        """Write down what is worth keeping, and end the threads."""
        for seq_id in list(self._prefetches):
            self.cancel(seq_id)
        for use in (self._now, *self._steps.values()):  # an engine that died leaves steps that never came back
            for slot in use.saves:
                self.memory.abandon(slot)
            for loading, _ in use.loads:
                loading.release()
        self.buffers.clear()
        self._now = _StepUse()
        self._steps.clear()
        if self.memory.lasts:
            self.memory.flush(flush_s)
        self.memory.close()

    def check_invariants(self) -> None:
        self.memory.check_invariants()
