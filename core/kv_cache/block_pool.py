"""The pool of KV block ids: ref-counts, the prefix index, and LRU reuse of blocks that nobody references.

A block is `block_size` tokens of K and V in every layer. Ids are logical: each stage keeps its own layers' pages under
the same id. A block is in exactly one of two states::

    referenced   ref_count >= 1, users hold it in their block tables
    free         ref_count == 0; if it has a hash its content can still be found (`lookup`) until the id is reused

Free blocks queue in the order in which they are reused: those without content first, then the least recently used.
Users free a sequence's blocks last block first, so a chain loses its tail before its head and never a parent before
its child.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Snapshot of a pool: block counts, and prefix index events since the start."""

    num_blocks: int
    num_free: int
    num_cached_free: int
    evictions: int

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free


class BlockPool:
    """Ids `0 .. num_blocks - 1`. Used by the engine thread alone."""

    def __init__(self, num_blocks: int, *, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, got {num_blocks}")
        self.num_blocks = num_blocks
        self.enable_prefix_caching = enable_prefix_caching
        self._ref_counts = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._evictions = 0
        self._cached_free = 0

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out, cached ones included."""
        return len(self._free)

    def ref_count(self, block: int) -> int:
        return self._ref_counts[block]

    def is_shared(self, block: int) -> bool:
        """Whether writing into the block would be seen by another user."""
        return self._ref_counts[block] > 1

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks with ref-count 1; their former content is forgotten. The caller checks `num_free`."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks asked for, {len(self._free)} free")
        return [self._take_oldest() for _ in range(count)]

    def _take_oldest(self) -> int:
        block, _ = self._free.popitem(last=False)
        digest = self._hash_of[block]
        if digest is not None:
            del self._block_of[digest]
            self._hash_of[block] = None
            self._evictions += 1
            self._cached_free -= 1
        self._ref_counts[block] = 1
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """Add a user to each block; a free block (found through the prefix index) becomes referenced again."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._free[block]
                self._cached_free -= self._hash_of[block] is not None
            self._ref_counts[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Remove a user from each block. Give a sequence's blocks in reverse order."""
        for block in blocks:
            if self._ref_counts[block] < 1:
                raise ValueError(f"block {block} is released more often than it was taken")
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)
                else:
                    self._cached_free += 1

    def lookup(self, digest: bytes) -> int | None:
        """The block whose content has this chained hash, if it is still there."""
        return self._block_of.get(digest)

    def register(self, block: int, digest: bytes) -> None:
        """Index a full block whose KV has been written. The first block with a given content keeps the entry."""
        if not self.enable_prefix_caching or digest in self._block_of:
            return
        old = self._hash_of[block]
        if old is not None:
            del self._block_of[old]
        self._hash_of[block] = digest
        self._block_of[digest] = block

    def clear_index(self) -> None:
        """Forget all cached content; blocks in use stay in use."""
        self._block_of.clear()
        self._hash_of = [None] * self.num_blocks
        self._cached_free = 0

    def stats(self) -> PoolStats:
        return PoolStats(self.num_blocks, len(self._free), self._cached_free, self._evictions)

    def check_invariants(self, users: Iterable[Iterable[int]] = ()) -> None:
        """Raise `AssertionError` unless every ref-count equals its users and the index and free list agree.

        `users` are the block tables of all live sequences.
        """
        counted = [0] * self.num_blocks
        for table in users:
            for block in table:
                counted[block] += 1
        if counted != self._ref_counts:
            wrong = [block for block in range(self.num_blocks) if counted[block] != self._ref_counts[block]]
            raise AssertionError(f"ref-counts differ from the users of blocks {wrong[:10]}")
        free = {block for block in range(self.num_blocks) if self._ref_counts[block] == 0}
        if free != set(self._free):
            raise AssertionError("the free list does not hold exactly the unreferenced blocks")
        if self._cached_free != sum(1 for block in free if self._hash_of[block] is not None):
            raise AssertionError("the count of free blocks with content is off")
        index = {digest: block for block, digest in enumerate(self._hash_of) if digest is not None}
        if index != self._block_of:
            raise AssertionError("the prefix index disagrees with the blocks' hashes")
