"""Which sequence holds which blocks: prefix hits, growth, copy-on-write, forks, release.

No torch here. `grow` decides and returns the page copies that the runner must make before the next forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from core.kv_cache.block_pool import BlockPool
from core.kv_cache.block_table import BlockTable, PrefixHasher


@dataclass(slots=True)
class PrefixStats:
    """Prompt tokens looked up in the prefix index, and how many of them were found. Written by the scheduler."""

    queried_tokens: int = 0
    hit_tokens: int = 0


class KVCacheManager:
    """Block tables of all live sequences over one `BlockPool`."""

    def __init__(
        self, num_blocks: int, block_size: int, *, salt: bytes = b"", enable_prefix_caching: bool = True
    ) -> None:
        self.pool = BlockPool(num_blocks, enable_prefix_caching=enable_prefix_caching)
        self.block_size = block_size
        self.prefix = PrefixStats()
        self._hasher = PrefixHasher(block_size, salt)
        self._tables: dict[int, BlockTable] = {}

    @property
    def capacity_tokens(self) -> int:
        return self.pool.num_blocks * self.block_size

    def table(self, seq_id: int) -> BlockTable:
        return self._tables[seq_id]

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match_prefix(self, token_ids: Sequence[int]) -> tuple[list[int], list[bytes]]:
        """Longest run of cached blocks that starts the tokens, leaving at least the last token to compute."""
        if not self.pool.enable_prefix_caching:
            return [], []
        hashes: list[bytes] = []
        blocks: list[int] = []
        for index in range((len(token_ids) - 1) // self.block_size):
            self._hasher.extend(hashes, token_ids, (index + 1) * self.block_size)
            block = self.pool.lookup(hashes[index])
            if block is None:
                return blocks, hashes[:index]
            blocks.append(block)
        return blocks, hashes

    def open(self, seq_id: int, token_ids: Sequence[int], *, read_prefix: bool) -> int:
        """Start a sequence, taking over cached blocks of its prefix. Returns the number of tokens they hold."""
        if seq_id in self._tables:
            raise ValueError(f"sequence {seq_id} already holds blocks")
        table = self._tables[seq_id] = BlockTable()
        if not read_prefix:
            return 0
        blocks, hashes = self.match_prefix(token_ids)
        self.pool.share(blocks)
        table.blocks.extend(blocks)
        table.hashes.extend(hashes)
        table.num_indexed = len(blocks)
        return len(blocks) * self.block_size

    def fork(self, parent_id: int, child_id: int, num_tokens: int) -> None:
        """Start a sequence that shares its parent's blocks for the first `num_tokens` tokens (copied when written)."""
        parent = self._tables[parent_id]
        table = self._tables[child_id] = BlockTable()
        count = self.blocks_for(num_tokens)
        self.pool.share(parent.blocks[:count])
        table.blocks.extend(parent.blocks[:count])
        full = min(num_tokens // self.block_size, len(parent.hashes))
        table.hashes.extend(parent.hashes[:full])
        table.num_indexed = min(parent.num_indexed, full)

    def blocks_needed(self, seq_id: int, first_token: int, num_tokens: int) -> int:
        """Blocks that must be free to write tokens `first_token .. num_tokens - 1`."""
        table = self._tables[seq_id]
        grown = max(0, self.blocks_for(num_tokens) - len(table))
        return grown + len(self._shared_written(table, first_token, num_tokens))

    def _shared_written(self, table: BlockTable, first_token: int, num_tokens: int) -> list[int]:
        last = min(self.blocks_for(num_tokens), len(table))
        return [i for i in range(first_token // self.block_size, last) if self.pool.is_shared(table.blocks[i])]

    def grow(self, seq_id: int, first_token: int, num_tokens: int) -> list[tuple[int, int]] | None:
        """Make tokens `first_token .. num_tokens - 1` writable. Returns `(source, target)` block copies to make first,
        or None, with nothing changed, if the pool has too few free blocks.
        """
        table = self._tables[seq_id]
        shared = self._shared_written(table, first_token, num_tokens)
        grown = max(0, self.blocks_for(num_tokens) - len(table))
        if grown + len(shared) > self.pool.num_free:
            return None
        copies = []
        for index in shared:
            source = table.blocks[index]
            (target,) = self.pool.allocate(1)
            table.blocks[index] = target
            table.num_indexed = min(table.num_indexed, index)
            self.pool.release([source])
            copies.append((source, target))
        table.blocks.extend(self.pool.allocate(grown))
        return copies

    def commit(self, seq_id: int, token_ids: Sequence[int], num_computed_tokens: int) -> None:
        """Index the full blocks whose KV has now been written."""
        if not self.pool.enable_prefix_caching:
            return
        table = self._tables[seq_id]
        self._hasher.extend(table.hashes, token_ids, num_computed_tokens)
        for index in range(table.num_indexed, num_computed_tokens // self.block_size):
            self.pool.register(table.blocks[index], table.hashes[index])
            table.num_indexed = index + 1

    def close(self, seq_id: int) -> None:
        """Release all blocks of a sequence; full ones stay findable until their ids are reused."""
        table = self._tables.pop(seq_id)
        self.pool.release(reversed(table.blocks))

    def check_invariants(self, live: Iterable[int] | None = None) -> None:
        """Audit the pool; with `live`, also that exactly those sequences hold block tables."""
        if live is not None and set(live) != set(self._tables):
            raise AssertionError(f"block tables of {set(self._tables) ^ set(live)} do not match the live sequences")
        self.pool.check_invariants(table.blocks for table in self._tables.values())
