"""One sequence's list of blocks, and the chained hashes that identify a prefix by content."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

import numpy as np


class BlockTable:
    """Blocks of a sequence in order: token `t` lives in `blocks[t // block_size]` at offset `t % block_size`.

    `hashes[i]` is the chained hash of block `i`, known once the block's tokens are; `num_indexed` counts the leading
    blocks that have been offered to the prefix index, `num_full` those that are written and will not be written again,
    `num_reused` the leading ones that others have computed, until the sequence has started.
    """

    __slots__ = ("blocks", "hashes", "num_full", "num_indexed", "num_reused")

    def __init__(self) -> None:
        self.blocks: array[int] = array("i")
        self.hashes: list[bytes] = []
        self.num_indexed = 0
        self.num_full = 0
        self.num_reused = 0

    def __len__(self) -> int:
        return len(self.blocks)

    def snapshot(self) -> np.ndarray:
        """Block ids as an int32 array of its own, safe to read while the table goes on changing."""
        return np.array(self.blocks, dtype=np.int32)


class PrefixHasher:
    """`h_i = H(h_{i-1}, tokens_i)`, with `h_{-1} = H(salt)`; equal hashes mean equal prefixes of whole blocks.

    The salt holds what else the KV depends on: model, dtype, revision.
    """

    def __init__(self, block_size: int, salt: bytes) -> None:
        self.block_size = block_size
        self._root = hashlib.blake2b(salt, digest_size=16).digest()

    def extend(self, hashes: list[bytes], token_ids: Sequence[int], upto_tokens: int) -> None:
        """Append the hashes of all full blocks among the first `upto_tokens` tokens that are not in `hashes` yet."""
        size = self.block_size
        for index in range(len(hashes), upto_tokens // size):
            tokens = np.asarray(token_ids[index * size : (index + 1) * size], dtype=np.int64)
            parent = hashes[-1] if hashes else self._root
            hashes.append(hashlib.blake2b(parent + tokens.tobytes(), digest_size=16).digest())
