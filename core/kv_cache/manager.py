"""Which sequence holds which blocks: prefix hits, growth, copy-on-write, forks, release.

No torch here. What has to be done to pages before the next forward pass is gathered in `pages` (`PageMap`), and the
scheduler puts it into the step with `take_step`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.kv_cache.block_pool import BlockPool
from core.kv_cache.block_table import BlockTable, PrefixChain, prefix_root
from core.kv_cache.companions import Companion, Lender, NoneRunning, Running, Tiers
from core.kv_cache.page_map import PageMap
from core.kv_cache.page_ops import StagePart
from core.kv_cache.stage_pages import StagePages


@dataclass(slots=True)
class PrefixStats:
    """Prompt tokens looked up in the prefix index, and how many of them were found. Written by the scheduler."""

    queried_tokens: int = 0
    hit_tokens: int = 0


class KVCacheManager:
    """Block tables of all live sequences over one `BlockPool`, and where each stage keeps the blocks' pages.

    `running` is what the scheduler knows of its sequences; `tiers` and `lender` are made for this manager, and asked
    when blocks leave the devices or the pool is dry. The scheduler computes the `unwanted` sequences again.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        salt: bytes = b"",
        enable_prefix_caching: bool = True,
        stages: Sequence[StagePages | None] = (None,),
        running: Running | None = None,
        tiers: Callable[[KVCacheManager], Tiers | None] = lambda kv: None,
        lender: Callable[[KVCacheManager], Lender | None] = lambda kv: None,
    ) -> None:
        self.pool = BlockPool(num_blocks, enable_prefix_caching=enable_prefix_caching)
        self.pool.on_evict = self._evicted
        self.pages = PageMap(stages)
        self.block_size = block_size
        self.prefix = PrefixStats()
        self.running: Running = running if running is not None else NoneRunning()
        self.unwanted: set[int] = set()
        self._taken = self._done = self._spoiled = 0
        self._salt = salt
        self._tables: dict[int, BlockTable] = {}
        self.refresh_limit()
        self.tiers: Tiers | None = None
        self.lender: Lender | None = None
        self.tiers = tiers(self)
        self.lender = lender(self)
        self._companions: tuple[Companion, ...] = tuple(filter(None, (self.tiers, self.lender)))

    @property
    def capacity_tokens(self) -> int:
        return self.pool.num_blocks * self.block_size

    def refresh_limit(self) -> None:
        """After regions came or went: as many blocks may hold content as every stage has pages for."""
        self.pool.set_limit(self.pages.backed(self.pool.num_blocks))

    @property
    def is_short(self) -> bool:
        """Whether there is memory for fewer blocks than were promised: what was lent has been taken back."""
        return self.pool.limit < self.pool.num_blocks

    @property
    def writable_blocks(self) -> int:
        """Blocks that can be written at the same time: what the scarcest stage has on its own device."""
        return min([self.pool.num_blocks, *(pages.local_pages for _, pages in self.pages.mapped)])

    def table(self, seq_id: int) -> BlockTable:
        return self._tables[seq_id]

    def sequences(self) -> list[int]:
        """Those that hold blocks."""
        return list(self._tables)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def chain(self, owner: str = "", variant: bytes = b"") -> PrefixChain:
        """For the hashes of a sequence's blocks; what one owner's sequences leave in the cache is no other's, and what
        has keys of another `variant` is not the same."""
        return PrefixChain(prefix_root(self._salt + variant, owner), self.block_size)

    def match_prefix(self, token_ids: Sequence[int], chain: PrefixChain | None = None) -> list[int]:
        """Longest run of cached blocks that starts the tokens, leaving at least the last token to compute."""
        if not self.pool.enable_prefix_caching:
            return []
        chain = chain or self.chain()
        blocks: list[int] = []
        for index in range((len(token_ids) - 1) // self.block_size):
            block = self.pool.lookup(chain.extend(token_ids, (index + 1) * self.block_size)[index])
            if block is None:
                break
            blocks.append(block)
        return blocks

    def open(
        self, seq_id: int, token_ids: Sequence[int], *, read_prefix: bool, chain: PrefixChain | None = None
    ) -> int:
        """Start a sequence, taking over cached blocks of its prefix. Returns the number of tokens they hold."""
        if seq_id in self._tables:
            raise ValueError(f"sequence {seq_id} already holds blocks")
        table = self._tables[seq_id] = BlockTable(chain or self.chain())
        if not read_prefix:
            return 0
        blocks = self.match_prefix(token_ids, table.chain)
        self.pool.share(blocks)
        table.blocks.extend(blocks)
        table.num_reused = len(blocks)
        self._restore(seq_id, table)
        table.num_indexed = table.num_full = len(table)
        return len(table) * self.block_size

    def prefetch(
        self, seq_id: int, token_ids: Sequence[int], on_done: Callable[[], Any], chain: PrefixChain | None = None
    ) -> bool:
        """Before a sequence is opened: fetch what tiers below have of its prefix. True: wait for `on_done`, which
        another thread calls.
        """
        if self.tiers is None or not self.pool.enable_prefix_caching:
            return False
        chain = chain or self.chain()
        blocks, count = self.match_prefix(token_ids, chain), (len(token_ids) - 1) // self.block_size
        hashes = chain.extend(token_ids, count * self.block_size)[:count]
        return self.tiers.prefetch(seq_id, len(blocks), hashes, on_done)

    def forget_prefetch(self, seq_id: int) -> None:
        """The sequence will not be opened."""
        if self.tiers is not None:
            self.tiers.cancel(seq_id)

    def _restore(self, seq_id: int, table: BlockTable) -> None:
        """Give a new sequence the blocks that were fetched for it, if there is room for them now."""
        fetched = self.tiers.take(seq_id, len(table)) if self.tiers is not None else None
        if self.tiers is None or fetched is None:
            return
        digests, loading = fetched
        room = self.ensure_free(len(digests)) and self.pages.can_write(len(digests), (), self._cold_blocks)
        first = len(table)
        for digest in digests if room else ():
            block = self._allocate()
            parent = table.chain.parent(len(table))
            table.blocks.append(block)
            self.pool.register(block, digest, parent)
        self.tiers.loaded(loading, digests if room else (), table.blocks[first:])

    def fork(self, parent_id: int, child_id: int, num_tokens: int, chain: PrefixChain | None = None) -> None:
        """Start a sequence that shares its parent's blocks for the first `num_tokens` tokens (copied when written)."""
        parent = self._tables[parent_id]
        table = self._tables[child_id] = BlockTable(chain or self.chain())
        count = self.blocks_for(num_tokens)
        self.pool.share(parent.blocks[:count])
        table.blocks.extend(parent.blocks[:count])
        known = len(table.chain.hashes)
        table.chain.hashes.extend(parent.chain.hashes[known : num_tokens // self.block_size])
        table.num_indexed = min(parent.num_indexed, num_tokens // self.block_size)
        table.num_full = min(parent.num_full, num_tokens // self.block_size)

    def blocks_needed(self, seq_id: int, first_token: int, num_tokens: int) -> int:
        """Blocks that must be free to write tokens `first_token .. num_tokens - 1`."""
        table = self._tables[seq_id]
        grown = max(0, self.blocks_for(num_tokens) - len(table))
        return grown + len(self._shared_written(table, first_token, num_tokens))

    def _shared_written(self, table: BlockTable, first_token: int, num_tokens: int) -> list[int]:
        last = min(self.blocks_for(num_tokens), len(table))
        return [i for i in range(first_token // self.block_size, last) if self.pool.is_shared(table.blocks[i])]

    def ensure_free(self, blocks: int) -> bool:
        """Whether so many blocks are free, after asking for more memory if they are not."""
        if blocks > self.pool.num_free and self.lender is not None:
            self.lender.borrow(blocks - self.pool.num_free)
        return blocks <= self.pool.num_free

    def grow(self, seq_id: int, first_token: int, num_tokens: int) -> bool:
        """Make tokens `first_token .. num_tokens - 1` writable. False, with nothing changed, if the pool has too few
        free blocks, or some stage too few local pages that could be free.
        """
        table = self._tables[seq_id]
        shared = self._shared_written(table, first_token, num_tokens)
        grown = max(0, self.blocks_for(num_tokens) - len(table))
        if not self.ensure_free(grown + len(shared)) or self.pool.num_holding > self.pool.limit:
            return False
        first = first_token // self.block_size
        table.num_full = min(table.num_full, first)
        if not self.pages.can_write(grown + len(shared), table.blocks[first:], self._cold_blocks):
            return False
        for index in shared:
            source = table.blocks[index]
            target = self._allocate()
            table.replace(index, target)
            table.num_indexed = min(table.num_indexed, index)
            self.pages.copy(source, target)
            self.pages.drop(self.pool.release([source]))
        for block in table.blocks[first:]:
            self.pages.bring_home(block, self._cold_blocks)
        table.blocks.extend(self._allocate() for _ in range(grown))
        if table.num_reused and self.tiers is not None:
            self.tiers.reused(table.blocks[: table.num_reused], table.chain.hashes[: table.num_reused])
        table.num_reused = 0  # a sequence that was opened has started
        return True

    def _allocate(self) -> int:
        (block,) = self.pool.allocate(1)
        self.pages.house(block, self._cold_blocks)
        return block

    def take_in(self, count: int) -> list[int]:
        """Blocks for content that comes from elsewhere: up to `count`, as many as are free without anything being
        moved. `give_in` them afterwards."""
        room = min([count, self.pool.num_free, *(pages.free_local for _, pages in self.pages.mapped)])
        return [self._allocate() for _ in range(room)]

    def give_in(self, blocks: Sequence[int], known: Sequence[tuple[bytes, bytes | None]]) -> None:
        """What was taken in has content now, `known` by its hash and that of the block before; or has none, where
        nothing is known of it. Nobody uses it yet: the first will be forgotten last."""
        for block, (digest, parent) in zip(blocks, known, strict=False):
            self.pool.register(block, digest, parent)
        self.pages.drop(self.pool.release(reversed(blocks)))

    def _evicted(self, block: int, digest: bytes) -> None:
        """The pool is about to forget a cached block."""
        if self.tiers is not None:
            self.tiers.save(block, digest, self.pool.parent_of(digest))
        self.pages.drop([block])

    def _cold_blocks(self, pages: StagePages) -> Iterator[int]:
        """A stage's local blocks that may live elsewhere, coldest first: what nobody references, then full blocks of
        single sequences in `cold_order`, of one that is being started after them, then shared ones."""
        yield from pages.local_among(np.array(self.pool.cached_blocks(), dtype=np.int64))
        shared: list[int] = []
        for seq_id in dict.fromkeys([*self.running.cold_order(), *self._tables]):
            table = self._tables[seq_id]
            full = np.array(table.blocks[: table.num_full], dtype=np.int64)
            for block in pages.local_among(full).tolist():
                if self.pool.is_shared(block):
                    shared.append(block)
                else:
                    yield block
        for block in dict.fromkeys(shared):
            if pages.is_local(block):
                yield block

    # -- steps ------------------------------------------------------------------------------------------------------

    def take_step(self, step: int) -> tuple[StagePart, ...]:
        """Each stage's part of step number `step`: what was gathered for it. Steps end in the order in which they are
        taken: say so with `step_done`.
        """
        self._taken = step
        parts = self.pages.take()
        for companion in self._companions:
            companion.step_taken(step)
        return parts

    def step_done(self, step: int, *, moved: bool = True) -> None:
        """The step has passed all stages, computed or not; not `moved`: its pages were not all moved. Then what steps
        behind it, and the one that is being gathered, save of their pages is worth nothing either.
        """
        self._done = step
        if not moved:
            self._spoiled = self._taken + 1
        for companion in self._companions:
            companion.step_done(step, moved and step > self._spoiled)

    @property
    def in_flight(self) -> bool:
        """Whether a step has been taken and is not done."""
        return self._done < self._taken

    def tick(self, waiting_blocks: int) -> None:
        """Let companions do what they do between two steps."""
        for companion in self._companions:
            companion.tick(waiting_blocks)

    @property
    def is_idle(self) -> bool:
        """Whether nothing has to be done while there is no work."""
        return not self.pages.has_ops and all(companion.is_idle for companion in self._companions)

    @property
    def wants_stop(self) -> bool:
        """Whether pages have to move before anything else is computed."""
        return any(companion.wants_stop for companion in self._companions)

    def commit(self, seq_id: int, token_ids: Sequence[int], num_computed_tokens: int) -> None:
        """Take note of the full blocks whose KV has now been written, and index them."""
        table = self._tables[seq_id]
        table.num_full = max(table.num_full, num_computed_tokens // self.block_size)
        if not self.pool.enable_prefix_caching:
            return
        hashes = table.chain.extend(token_ids, num_computed_tokens)
        for index in range(table.num_indexed, num_computed_tokens // self.block_size):
            self.pool.register(table.blocks[index], hashes[index], table.chain.parent(index))
            table.num_indexed = index + 1

    def close(self, seq_id: int) -> None:
        """Release all blocks of a sequence; full ones stay findable until their ids are reused."""
        table = self._tables.pop(seq_id)
        self.pages.drop(self.pool.release(reversed(table.blocks)))

    def close_and_drop_away(self, seq_id: int) -> None:
        """Release a sequence's blocks. From the first that some stage keeps elsewhere on, those that nobody else uses
        are forgotten, here and for good: carrying them to a tier below would take as long as bringing them home, and
        what comes behind cannot be found without them.
        """
        blocks = self._tables[seq_id].blocks
        is_away = [any(not pages.is_local(block) for _, pages in self.pages.mapped) for block in blocks]
        self.close(seq_id)
        for block in reversed(blocks[is_away.index(True) :] if True in is_away else ()):
            if self.pool.ref_count(block) == 0 and self.pool.hash_of(block) is not None:
                self.pool.evict(block, tell=False)
                self.pages.drop([block])

    def forget_cached(self) -> None:
        """Forget all cached content; blocks in use stay in use."""
        self.pages.drop(self.pool.clear_index())
        for table in self._tables.values():
            table.num_indexed = 0

    def disconnect(self) -> None:
        """The engine has ended: nobody is asked or told anything any more, and whoever was can go."""
        self.running = NoneRunning()
        self.pool.on_evict = lambda block, digest: None
        self._companions, self.tiers, self.lender = (), None, None

    def check_invariants(self, live: Iterable[int] | None = None) -> None:
        """Audit the pool; with `live`, also that exactly those sequences hold block tables."""
        if live is not None and set(live) != set(self._tables):
            raise AssertionError(f"block tables of {set(self._tables) ^ set(live)} do not match the live sequences")
        self.pool.check_invariants(table.blocks for table in self._tables.values())
        referenced = {block for table in self._tables.values() for block in table.blocks}
        self.pages.check_invariants(referenced.union(self.pool.cached_blocks()))
        for companion in self._companions:
            companion.check_invariants()
