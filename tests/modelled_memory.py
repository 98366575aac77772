"""Pages as a model of memory: each stage carries out its part of the steps in order, as late as it likes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from core.kv_cache.manager import KVCacheManager
from core.kv_cache.page_ops import LOCAL, PageCopy, PageLoad, PageRef, PageSave, StagePart

BLOCK, BLOCKS = 2, 12
Content = list[object]


@dataclass
class FakeSlot:
    block: bytes
    buffer: Any = field(default_factory=dict)


class FakeTiers:
    """Keeps all that is saved, once the step that saves it is done."""

    is_idle, wants_stop = True, False

    def __init__(self, kv: KVCacheManager) -> None:
        self.kv = kv
        self.kept: dict[bytes, FakeSlot] = {}
        self.buffers: dict[bytes, Any] = {}
        self.saving: list[FakeSlot] = []
        self.steps: dict[int, list[FakeSlot]] = {}
        self.asked: dict[int, tuple[int, Sequence[bytes]]] = {}
        self.restored = 0

    def save(self, block: int, digest: bytes, parent: bytes | None) -> None:
        held = [self.kept.values(), self.saving, *self.steps.values()]
        if any(slot.block == digest for slots in held for slot in slots):
            return
        self.saving.append(FakeSlot(digest))
        self.buffers[digest] = self.saving[-1].buffer
        self.kv.pages.save(block, digest, 0)

    def reused(self, blocks: Sequence[int], digests: Sequence[bytes]) -> None:
        for block, digest in zip(blocks, digests, strict=True):
            if digest not in self.kept:
                self.save(block, digest, None)

    def prefetch(self, seq_id: int, known: int, hashes: Sequence[bytes], on_done: Callable[[], Any]) -> bool:
        self.asked[seq_id] = known, hashes
        return False

    def take(self, seq_id: int, known: int) -> tuple[list[bytes], None] | None:
        _, hashes = self.asked.pop(seq_id, (0, ()))
        found: list[bytes] = []
        for digest in hashes[known:]:
            if digest not in self.kept:
                break
            found.append(digest)
        return (found, None) if found else None

    def loaded(self, loading: Any, digests: Sequence[bytes], blocks: Sequence[int]) -> None:
        for digest, block in zip(digests, blocks, strict=True):
            self.kv.pages.load(digest, block, 0)
        self.restored += len(digests)

    def cancel(self, seq_id: int) -> None:
        self.asked.pop(seq_id, None)

    def tick(self, waiting_blocks: int) -> None: ...

    def step_taken(self, step: int) -> None:
        self.steps[step], self.saving = self.saving, []

    def step_done(self, step: int, moved: bool) -> None:
        for number in [number for number in self.steps if number <= step]:
            self.kept.update((slot.block, slot) for slot in self.steps.pop(number))

    def check_invariants(self) -> None: ...


class Memory:
    """One stage's pages. What is not there cannot be read: a region that is gone raises `KeyError`."""

    def __init__(self, index: int, local_pages: int, buffers: dict[bytes, Any] | None = None) -> None:
        self.index = index
        self.buffers = {} if buffers is None else buffers
        self.directory: dict[int, PageRef] = {}
        self.regions: dict[int, list[Content]] = {}
        self.add(LOCAL, local_pages)

    def add(self, region: int, pages: int) -> None:
        self.regions[region] = [[None] * BLOCK for _ in range(pages)]

    def page(self, ref: PageRef) -> Content:
        return self.regions[ref[0]][ref[1]]

    def run(self, part: StagePart, items: Sequence[Item]) -> None:
        self.directory.update((block, (region, page)) for block, region, page in part.placed.tolist())
        for op in part.ops:
            if isinstance(op, PageCopy):
                self.page(op.target)[:] = self.page(op.source)
            elif isinstance(op, PageSave):
                self.buffers[op.block_hash][self.index] = list(self.page(op.source))
            elif isinstance(op, PageLoad):
                self.page(op.target)[:] = self.buffers[op.block_hash][self.index]
        for item in items:
            self.write_and_read(item, [self.directory.get(block, (LOCAL, block)) for block in item.blocks])

    def write_and_read(self, item: Item, refs: list[PageRef]) -> None:
        """The KV of a token depends on all tokens up to it."""
        for position in range(item.start, item.end):
            ref = refs[position // BLOCK]
            assert ref[0] == LOCAL, "a block is written away from home"
            self.page(ref)[position % BLOCK] = item.tokens[: position + 1]
        for position in range(item.end):
            assert self.page(refs[position // BLOCK])[position % BLOCK] == item.tokens[: position + 1]


@dataclass
class Item:
    """A sequence's part of a step."""

    seq_id: int
    tokens: tuple[int, ...]
    start: int
    end: int
    blocks: list[int]
