"""One sequence's list of blocks, and the chained hashes that identify a prefix by content."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


class PrefixChain:
    """The chained hashes of a sequence's blocks: `h_i = H(h_{i-1}, tokens_i)`, with `h_{-1}` the `root`; equal hashes
    mean equal prefixes of whole blocks. They are worked out once, and outlive the sequence's blocks.

    The root holds what else the KV depends on (model, dtype, revision), and whose it is.
    """

    __slots__ = ("_block_size", "_root", "hashes")

    def __init__(self, root: bytes, block_size: int) -> None:
        self.hashes: list[bytes] = []
        self._root = root
        self._block_size = block_size

    def extend(self, token_ids: Sequence[int], upto_tokens: int) -> list[bytes]:
        """`hashes`, with those of all full blocks among the first `upto_tokens` tokens."""
        size, hashes = self._block_size, self.hashes
        for index in range(len(hashes), upto_tokens // size):
            tokens = np.asarray(token_ids[index * size : (index + 1) * size], dtype=np.int64)
            parent = hashes[-1] if hashes else self._root
            hashes.append(hashlib.blake2b(parent + tokens.tobytes(), digest_size=16).digest())
        return hashes

    def parent(self, index: int) -> bytes | None:
        """The hash of the block before number `index`."""
        return self.hashes[index - 1] if index else None


@dataclass(frozen=True, slots=True)
class RopeBorder:
    """For models whose rotary frequencies change where a sequence has more than `tokens` tokens: a prompt's keys are
    not those of the same tokens at the beginning of a longer one. `exact`: each length beyond has its own frequencies.
    `restarts`: a sequence that outgrows the border is computed anew.
    """

    tokens: int
    exact: bool = False
    restarts: bool = False

    def variant(self, prompt_tokens: int, tokens: int) -> bytes:
        """Tells keys of the same tokens apart, for a sequence of so many tokens of which some are its prompt."""
        length = tokens if self.restarts else prompt_tokens
        if length <= self.tokens:
            return b""
        return b"\0rope:%d" % (length if self.exact else self.tokens)


def prefix_root(salt: bytes, owner: str) -> bytes:
    """What the chains of an owner's sequences begin with."""
    return hashlib.blake2b(salt + b"\0" + owner.encode(), digest_size=16).digest()


@dataclass(slots=True, eq=False)
class BlockTable:
    """Blocks of a sequence in order: token `t` lives in `blocks[t // block_size]` at offset `t % block_size`.

    `chain` has the hashes of its blocks, as far as they are known; `num_indexed` counts the leading blocks that have
    been offered to the prefix index, `num_full` those that are written and will not be written again, `num_reused` the
    leading ones that others have computed, until the sequence has started. `num_told` of the blocks are known to the
    stages, but for those at `changed`.
    """

    chain: PrefixChain
    blocks: array[int] = field(default_factory=lambda: array("i"))
    num_indexed: int = 0
    num_full: int = 0
    num_reused: int = 0
    num_told: int = 0
    changed: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.blocks)

    def replace(self, index: int, block: int) -> None:
        """Another block in the place of one."""
        self.blocks[index] = block
        if index < self.num_told:
            self.changed.append(index)

    def tell_all(self) -> npt.NDArray[np.int32]:
        """All block ids, int32, an array of its own."""
        self.num_told = len(self.blocks)
        self.changed.clear()
        return np.array(self.blocks, dtype=np.int32)

    def tell_changes(self) -> list[tuple[int, int]]:
        """`(index, block)` of what is new or has changed since it was last told."""
        if self.num_told == len(self.blocks) and not self.changed:
            return []
        told = [*dict.fromkeys(self.changed), *range(self.num_told, len(self.blocks))]
        self.num_told = len(self.blocks)
        self.changed.clear()
        return [(index, self.blocks[index]) for index in told]
