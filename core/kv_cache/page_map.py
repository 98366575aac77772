"""All stages' pages, and the operations on them that the next step carries. No torch here.

A stage with a page of its own for every block id needs no table: the page is the id. Stages that are short of memory
have fewer pages, and keep cold blocks elsewhere: whatever is written in this step is local, everything else may be in a
leased region, where it is attended in place.

The map is changed by the engine thread while steps are in flight. That is safe because every stage executes steps, and
the operations that come with them, in order: a page that is given to another block here is written only by a later
step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from core.kv_cache.page_ops import LOCAL, NO_PART, PageCopy, PageLoad, PageOp, PageRef, PageSave, StagePart
from core.kv_cache.stage_pages import StagePages

ColdBlocks = Callable[[StagePages], Iterable[int]]
"""Local blocks of a stage that may move, coldest first."""

MOVES_AT_ONCE = 8
"""Blocks that make room together, so that the search for cold ones is not repeated for each."""


class PageMap:
    """`stages` has None for a stage whose pages are numbered by block id; `mapped` are the others, with their index."""

    def __init__(self, stages: Sequence[StagePages | None] = (None,)) -> None:
        self.stages = tuple(stages)
        self._ops: list[list[PageOp]] = [[] for _ in stages]
        self.mapped = [(index, pages) for index, pages in enumerate(stages) if pages is not None]
        self.moved_out = self.moved_home = 0

    @property
    def is_trivial(self) -> bool:
        """Whether no stage keeps a table."""
        return not self.mapped

    def backed(self, num_blocks: int) -> int:
        """Blocks that every stage has a page for."""
        return min([num_blocks, *(pages.backed for _, pages in self.mapped)])

    def can_write(self, new: int, existing: Sequence[int], cold: ColdBlocks) -> bool:
        """Whether `new` blocks more and those of `existing` that are away can be local, in every stage."""
        for _, pages in self.mapped:
            lacking = new + sum(not pages.is_local(block) for block in existing) - pages.free_local
            if lacking > 0 and sum(1 for _ in islice(cold(pages), lacking)) < lacking:
                return False
        return True

    def house(self, block: int, cold: ColdBlocks) -> None:
        """A block that is about to be written gets a local page in every stage."""
        for index, pages in self.mapped:
            self._make_room(index, pages, cold)
            pages.house(block)

    def bring_home(self, block: int, cold: ColdBlocks) -> None:
        """Before a block that exists is written: its pages have to be local."""
        for index, pages in self.mapped:
            if not pages.is_local(block):
                self._make_room(index, pages, cold)
                self.move(index, block, LOCAL)

    def _make_room(self, index: int, pages: StagePages, cold: ColdBlocks) -> None:
        """Have a free local page; where there is none, some of the coldest local blocks move to where there is room."""
        if pages.free_local:
            return
        for block in islice(cold(pages), MOVES_AT_ONCE):
            target = next(pages.roomy(), None)
            if target is None:
                break
            self.move(index, int(block), target.region_id)
        if not pages.free_local:
            raise RuntimeError(f"{pages.site}: no block can make room for one that is to be written")

    def move(self, index: int, block: int, region_id: int) -> None:
        """Move a block of one stage to a region with a free page."""
        pages = self.stages[index]
        assert pages is not None
        self._ops[index].append(pages.move(block, region_id))
        self.moved_home += region_id == LOCAL
        self.moved_out += region_id != LOCAL

    def drop(self, blocks: Iterable[int]) -> None:
        """Blocks that no longer hold content give up their pages."""
        for block in blocks:
            for _, pages in self.mapped:
                pages.drop(block)

    def copy(self, source: int, target: int) -> None:
        """Before `target` is written, it gets a copy of `source`."""
        for index in range(len(self.stages)):
            self._ops[index].append(PageCopy(self.ref(index, source), self.ref(index, target)))

    def save(self, block: int, block_hash: bytes, slot: int) -> None:
        """Copy a block to a slot of main memory."""
        for index in range(len(self.stages)):
            self._ops[index].append(PageSave(self.ref(index, block), block_hash, slot))

    def load(self, block_hash: bytes, block: int, slot: int) -> None:
        """Fill a block from a slot of main memory."""
        for index in range(len(self.stages)):
            self._ops[index].append(PageLoad(block_hash, self.ref(index, block), slot))

    def ref(self, index: int, block: int) -> PageRef:
        """Where stage number `index` has a block that holds content."""
        pages = self.stages[index]
        if pages is None:
            return LOCAL, block
        ref = pages.where(block)
        assert ref is not None
        return ref

    @property
    def has_ops(self) -> bool:
        return any(self._ops)

    def take(self) -> tuple[StagePart, ...]:
        """Each stage's part of a step: operations since the last, and where blocks are that have moved since."""
        if self.is_trivial and not self.has_ops:
            return ()
        parts = []
        for ops, pages in zip(self._ops, self.stages, strict=True):
            if pages is not None:
                parts.append(StagePart(tuple(ops), pages.take_moved()))
            else:
                parts.append(StagePart(tuple(ops)) if ops else NO_PART)
            ops.clear()
        return tuple(parts)

    def check_invariants(self, holding: Iterable[int]) -> None:
        """Raise `AssertionError` unless exactly the blocks `holding` content have pages, in every stage."""
        blocks = list(holding)
        for _, pages in self.mapped:
            pages.check_invariants(blocks)
