"""What the rooms of `core.tiers` hand to each other: tiers, the layout of a block, speeds, statistics. No torch."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from core.tiers.hotness import HeatSpread

Quantization = Literal["none", "int8", "fp8"]
MoveKind = Literal["promotion", "demotion", "eviction"]

ELEMENT_BYTES: Mapping[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4}


class Tier(enum.IntEnum):
    """Where a block of KV can be, nearest first. `core.tiers` keeps L3 to L6; L1 and L2 are the engine's."""

    L1 = 1  # own VRAM
    L2 = 2  # another GPU's VRAM
    L3 = 3  # host RAM
    L4 = 4  # another node's RAM
    L5 = 5  # local disk
    L6 = 6  # network or object storage


Move = tuple[MoveKind, Tier, Tier | None]
"""Kind, from, to; None for a block that no tier keeps."""


@dataclass(frozen=True, slots=True)
class Page:
    """K or V of one layer: `rows` (block_size x kv_heads) of `dim` numbers."""

    rows: int
    dim: int


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """A block's payload, page-first: for each layer in order the K page `[block_size, kv_heads, key_dim]`, then the V
    page `[block_size, kv_heads, value_dim]`, without gaps."""

    block_size: int
    dtype: str
    pages: tuple[Page, ...]
    nbytes: int

    @classmethod
    def of(cls, shapes: Iterable[tuple[int, int, int]], block_size: int, dtype: str) -> BlockLayout:
        """The layout of a model by the (KV heads, key width, value width) of its layers; `dtype` is bfloat16, float16
        or float32.

        Raises `ValueError` for another dtype.
        """
        if dtype not in ELEMENT_BYTES:
            raise ValueError(f"KV of type {dtype} has no layout; known are {', '.join(ELEMENT_BYTES)}")
        pages = tuple(Page(block_size * heads, dim) for heads, *dims in shapes for dim in dims)
        return cls(block_size, dtype, pages, sum(page.rows * page.dim for page in pages) * ELEMENT_BYTES[dtype])

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]

    def digest(self) -> str:
        """Hex digest that differs wherever payloads of two layouts would be read differently."""
        text = repr((self.block_size, self.dtype, [(page.rows, page.dim) for page in self.pages]))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class TierSpeed:
    """What a tier does with whole blocks: bytes per second, and seconds until the first byte of a read."""

    read_bytes_s: float
    write_bytes_s: float
    latency_s: float = 0.0

    def fetch_s(self, nbytes: int) -> float:
        """Seconds to read `nbytes` in one piece."""
        return self.latency_s + nbytes / self.read_bytes_s


@dataclass(frozen=True, slots=True)
class TierStats:
    """One tier now, and its counters since the start. Speeds are measured: at start, then on every block moved.

    `hotness` says how hot the blocks are, `stopped` why nothing is written there at the moment; `damaged` counts blocks
    that failed their checksum or had vanished when they were read.
    """

    tier: Tier
    blocks: int
    bytes: int
    capacity_bytes: int
    hits: int
    misses: int
    hotness: HeatSpread
    speed: TierSpeed | None
    medium: str = ""
    codec: str = "none"
    stopped: str | None = None
    damaged: int = 0


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """The whole hierarchy at one moment. `moves` counts blocks; a write that found the queue full, or a block that left
    before it was written, is a dropped write."""

    tiers: tuple[TierStats, ...] = ()
    moves: Mapping[Move, int] = field(default_factory=dict)
    queued_writes: int = 0
    dropped_writes: int = 0


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """One block for a status view."""

    hash: bytes
    hotness: float
    pinned: bool


class BlockStore(Protocol):
    """A tier below host RAM. Reads come from several threads, everything else from one.

    `medium` is what it is made of, as measured or told; empty if unknown. `stopped` says why writing failed last.
    """

    tier: Tier
    stopped: str | None

    @property
    def medium(self) -> str: ...

    @property
    def capacity_bytes(self) -> int: ...

    @property
    def accepting(self) -> bool:
        """Whether writing can succeed at the moment."""

    @property
    def used_bytes(self) -> int: ...

    @property
    def codec_name(self) -> str: ...

    def known(self) -> list[tuple[bytes, bytes]]:
        """`(hash, parent)` of the blocks found at the start, oldest first."""

    def has_room(self) -> bool:
        """Whether one more block fits without exceeding the capacity."""

    def write(self, block: bytes, parent: bytes, payload: memoryview) -> bool:
        """Keep a copy of `payload` (`block_nbytes`); False if it cannot be kept, with the reason logged."""

    def read(self, block: bytes, into: memoryview) -> bool:
        """Fill `into` (`block_nbytes`); False if the block has vanished or is damaged, which is logged."""

    def drop(self, block: bytes) -> None:
        """Forget a block; unknown ones are ignored."""

    def sync(self) -> None:
        """Make what was written survive the end of the process."""

    def close(self) -> None: ...
