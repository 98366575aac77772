"""The pool of KV block ids: ref-counts, the prefix index, and LRU reuse of blocks that nobody references.

A block is `block_size` tokens of K and V in every layer. Ids are logical: each stage keeps its own layers' pages for an
id, wherever it has room (`core.kv_cache.page_map`). A block is in exactly one of three states::

    referenced   ref_count >= 1, users hold it in their block tables
    cached       ref_count == 0, but its content can still be found (`lookup`) until the id is reused
    empty        neither

Referenced and cached blocks hold pages. There may be fewer pages than ids: `limit` is how many blocks the pages of the
scarcest stage hold at the moment, and it moves as memory is lent and given back.

Empty blocks are handed out first, then the least recently used cached one. Users free a sequence's blocks last block
first, so a chain loses its tail before its head and never a parent before its child.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

EvictCall = Callable[[int, bytes], None]
"""Told of a block and the hash of its content, which is about to be forgotten."""


class BlockPool:
    """Ids `0 .. num_blocks - 1`. Used by the engine thread alone. `on_evict` is called before content is forgotten.

    `limit` is how many blocks may hold content at the same time; `evictions` counts since the start.
    """

    def __init__(self, num_blocks: int, *, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, got {num_blocks}")
        self.num_blocks = num_blocks
        self.enable_prefix_caching = enable_prefix_caching
        self.on_evict: EvictCall = lambda block, digest: None
        self.limit = num_blocks
        self._ref_counts = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._parent_of: dict[bytes, bytes | None] = {}
        self._block_of: dict[bytes, int] = {}
        self._empty: list[int] = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self.evictions = 0

    @property
    def num_referenced(self) -> int:
        return self.num_blocks - len(self._empty) - len(self._cached)

    @property
    def num_holding(self) -> int:
        """Blocks that hold pages: referenced and cached ones."""
        return self.num_blocks - len(self._empty)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out, cached ones included."""
        return max(0, self.limit - self.num_referenced)

    def set_limit(self, limit: int) -> None:
        """From now on at most `limit` blocks hold content; cached ones beyond it are forgotten, least recently used
        first. If more are referenced, none is free until enough users have gone."""
        if not 0 <= limit <= self.num_blocks:
            raise ValueError(f"the limit is 0 to {self.num_blocks}, got {limit}")
        self.limit = limit
        self._keep_to_limit()

    def _keep_to_limit(self) -> None:
        while self._cached and self.num_holding > self.limit:
            self._empty.append(self._evict_oldest())

    def ref_count(self, block: int) -> int:
        return self._ref_counts[block]

    def is_shared(self, block: int) -> bool:
        """Whether writing into the block would be seen by another user."""
        return self._ref_counts[block] > 1

    def cached_blocks(self) -> list[int]:
        """Unreferenced blocks with content, least recently used first."""
        return list(self._cached)

    def hash_of(self, block: int) -> bytes | None:
        """What identifies the block's content, if it is indexed."""
        return self._hash_of[block]

    def parent_of(self, digest: bytes) -> bytes | None:
        """The hash of the block before an indexed one; None for the first of a chain."""
        return self._parent_of[digest]

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks with ref-count 1; their former content is forgotten. The caller checks `num_free`."""
        if count > self.num_free:
            raise ValueError(f"{count} blocks asked for, {self.num_free} free")
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        has_room = self._empty and self.num_holding < self.limit
        block = self._empty.pop() if has_room else self._evict_oldest()
        self._ref_counts[block] = 1
        return block

    def _evict_oldest(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self._forget(block)
        return block

    def _forget(self, block: int, *, tell: bool = True) -> None:
        digest = self._hash_of[block]
        assert digest is not None
        if tell:
            self.on_evict(block, digest)
        del self._block_of[digest], self._parent_of[digest]
        self._hash_of[block] = None
        self.evictions += 1

    def evict(self, block: int, *, tell: bool = True) -> None:
        """Forget a cached block now, before its turn; without `tell`, `on_evict` does not hear of it."""
        del self._cached[block]
        self._forget(block, tell=tell)
        self._empty.append(block)

    def share(self, blocks: Iterable[int]) -> None:
        """Add a user to each block; a cached one (found through the prefix index) becomes referenced again."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._cached[block]
            self._ref_counts[block] += 1

    def release(self, blocks: Iterable[int]) -> list[int]:
        """Remove a user from each block; returns those that are empty now. Give a sequence's blocks in reverse
        order. Content is kept as far as the limit allows.
        """
        emptied = []
        for block in blocks:
            if self._ref_counts[block] < 1:
                raise ValueError(f"block {block} is released more often than it was taken")
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if self._hash_of[block] is not None:
                    self._cached[block] = None
                else:
                    self._empty.append(block)
                    emptied.append(block)
        self._keep_to_limit()
        return emptied

    def lookup(self, digest: bytes) -> int | None:
        """The block whose content has this chained hash, if it is still there."""
        return self._block_of.get(digest)

    def register(self, block: int, digest: bytes, parent: bytes | None = None) -> None:
        """Index a full block whose KV has been written. The first block with a given content keeps the entry."""
        if not self.enable_prefix_caching or digest in self._block_of:
            return
        old = self._hash_of[block]
        if old is not None:
            del self._block_of[old], self._parent_of[old]
        self._hash_of[block] = digest
        self._block_of[digest] = block
        self._parent_of[digest] = parent

    def clear_index(self) -> list[int]:
        """Forget all cached content; blocks in use stay in use. Returns the blocks that are empty now."""
        emptied = list(self._cached)
        self._cached.clear()
        self._empty.extend(emptied)
        self._block_of.clear()
        self._parent_of.clear()
        self._hash_of = [None] * self.num_blocks
        return emptied

    def check_invariants(self, users: Iterable[Iterable[int]] = ()) -> None:
        """Raise `AssertionError` unless every ref-count equals its users and the index and free lists agree.

        `users` are the block tables of all live sequences.
        """
        counted = [0] * self.num_blocks
        for table in users:
            for block in table:
                counted[block] += 1
        if counted != self._ref_counts:
            wrong = [block for block in range(self.num_blocks) if counted[block] != self._ref_counts[block]]
            raise AssertionError(f"ref-counts differ from the users of blocks {wrong[:10]}")
        free = [block for block in range(self.num_blocks) if self._ref_counts[block] == 0]
        if sorted([*self._empty, *self._cached]) != free:
            raise AssertionError("the free lists do not hold exactly the unreferenced blocks")
        if any(self._hash_of[block] is not None for block in self._empty):
            raise AssertionError("a block with content is held for empty")
        if any(self._hash_of[block] is None for block in self._cached):
            raise AssertionError("a block without content is held for cached")
        index = {digest: block for block, digest in enumerate(self._hash_of) if digest is not None}
        if index != self._block_of or index.keys() != self._parent_of.keys():
            raise AssertionError("the prefix index disagrees with the blocks' hashes")
        if self._cached and self.num_holding > self.limit:
            raise AssertionError(f"{self.num_holding} blocks hold content, and there are pages for {self.limit}")
