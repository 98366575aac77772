"""Which variants of the Triton kernel a model needs, and how large a piece of a batch a program of each takes. Pure.

A variant is everything that is compiled into a kernel. Nothing else about a launch makes Triton compile again, so all
that serving can ask for is known from a model's layers, and none is compiled later than at load.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from core.errors import UnsupportedModelError
from core.execution.attention.metadata import AttentionSpec

_MIN_TILE = 16  # tl.dot's smallest side
_MOST_ROWS = 64
_SCRATCH_BYTES = 1024
"""For reductions over a tile, beside what it holds."""

_WARP_GROUP_ROWS = 64

_TILES = (
    (64, 64, 3),
    (64, 32, 3),
    (64, 64, 1),
    (64, 32, 1),
    (32, 32, 3),
    (32, 32, 1),
    (16, 32, 3),
    (16, 32, 1),
    (16, 16, 1),
)
"""Rows, keys and pipeline stages, the quickest first."""

_MOST_UNROLLED = 16 * 32 * 128
_MOST_KEYS_UNROLLED = 32
"""Multiplications of a tile's scores, and its keys, where no tensor core multiplies: each is an instruction. With more
of them, values do not stay in the registers, and compiling takes minutes."""

_MOST_ROWS_RDNA = 32
"""On AMD's cards for desktops: with more rows, or a pipeline, values do not stay in the registers."""

_WIDE = 64 * 256
"""So many results are shared by eight warps: with four they do not fit into the registers."""


@dataclass(frozen=True, slots=True)
class GpuLimits:
    """What a kernel finds on a card: `capability` is NVIDIA's (86 for 8.6), 0 on AMD's; `shared_bytes` what one block
    of threads may have of shared memory; `warp_size` threads go together."""

    backend: Literal["cuda", "hip"]
    capability: int
    shared_bytes: int
    warp_size: int = 32


@dataclass(frozen=True, slots=True)
class Heads:
    """One layer's: `group` query heads share each of `num_kv_heads` KV heads."""

    num_kv_heads: int
    group: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class AttentionKind:
    """How a layer attends, apart from numbers: what the variants of its kernels follow from. `sinks` is their dtype,
    None if there are none."""

    heads: Heads
    block_size: int
    has_window: bool
    has_softcap: bool
    sinks: torch.dtype | None


@dataclass(frozen=True, slots=True)
class Tile:
    """A program's: `rows` query rows (of several positions and of the heads that share a KV head) by `keys` keys at a
    time; `stages` in flight, computed by `warps`."""

    rows: int
    keys: int
    stages: int
    warps: int


@dataclass(frozen=True, slots=True)
class Variant:
    """All that is compiled into one kernel. A partial one serves a site: it has bounds in place of causality and
    window, gives the log-sum-exp and leaves sinks out, so its `kind` has neither window nor sinks."""

    kind: AttentionKind
    tile: Tile
    is_partial: bool
    is_aligned: bool = True

    @property
    def heads_per_tile(self) -> int:
        return min(power_of_2(self.kind.heads.group), self.tile.rows)

    @property
    def queries_per_tile(self) -> int:
        """Positions."""
        return self.tile.rows // self.heads_per_tile


def kind_of(query: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, spec: AttentionSpec) -> AttentionKind:
    """What these tensors ask for; shapes as in `core.execution.attention.torch_paged`."""
    kv_heads = k_pages.shape[2]
    heads = Heads(kv_heads, query.shape[1] // kv_heads, k_pages.shape[3], v_pages.shape[3], query.dtype)
    sinks = None if spec.sinks is None else spec.sinks.dtype
    return AttentionKind(heads, k_pages.shape[1], spec.window is not None, spec.softcap is not None, sinks)


def power_of_2(count: int) -> int:
    """The smallest power of two that is no less than `count`."""
    return 1 << (count - 1).bit_length()


def padded_dim(dim: int) -> int:
    """Numbers of a head as the tile has them."""
    return max(_MIN_TILE, power_of_2(dim))


def shared_bytes(heads: Heads, tile: Tile, limits: GpuLimits) -> int:
    """At most what the kernel takes of shared memory. It is compared with what compilers say, in tests.

    All hold keys and values of a round, and weights on their way from one product to the next. AMD's overlay the query
    with them, and without a pipeline keys with values. NVIDIA's hold the query; where four warps do a product together
    (9.0) keys and values of two rounds; before 8.0 the operands of one product, in fp32.
    """
    size = 4 if _is_unrolled(heads, limits) else heads.dtype.itemsize
    query = tile.rows * padded_dim(heads.key_dim) * size
    key, value = (tile.keys * padded_dim(dim) * size for dim in (heads.key_dim, heads.value_dim))
    weights = tile.rows * tile.keys * size + _SCRATCH_BYTES
    if limits.backend == "hip":
        return max(query, key + value + weights if tile.stages > 1 else max(key, value) + weights)
    if limits.capability == 90 and tile.rows >= _WARP_GROUP_ROWS:
        return query + 2 * (key + value) + weights
    if limits.capability < 80:
        return query + max(key, value) + weights
    return query + key + value + weights


def _is_unrolled(heads: Heads, limits: GpuLimits) -> bool:
    """Triton uses tensor cores for 16 bits, from Ampere on."""
    return heads.dtype.itemsize > 2 or (limits.backend == "cuda" and limits.capability < 80)


def choose_tile(heads: Heads, is_prefill: bool, limits: GpuLimits) -> Tile:
    """The quickest tile that fits the card. Raises `UnsupportedModelError` if none does."""
    padded = padded_dim(heads.key_dim), padded_dim(heads.value_dim)
    most_rows = _MOST_ROWS if is_prefill else min(_MOST_ROWS, max(_MIN_TILE, power_of_2(heads.group)))
    is_unrolled, is_rdna = _is_unrolled(heads, limits), limits.backend == "hip" and limits.warp_size == 32
    for rows, keys, stages in _TILES:
        rows = min(rows, most_rows)
        is_smallest = (rows, keys) == (_MIN_TILE, _MIN_TILE)
        is_long = keys > _MOST_KEYS_UNROLLED or rows * keys * max(padded) > _MOST_UNROLLED
        if is_unrolled and is_long and not is_smallest:
            continue
        if is_rdna and (rows > _MOST_ROWS_RDNA or stages > 1):
            continue
        tile = Tile(rows, keys, stages, 8 if rows * padded[1] >= _WIDE else 4)
        if shared_bytes(heads, tile, limits) <= limits.shared_bytes:
            return tile
    raise UnsupportedModelError(
        f"heads of {heads.key_dim} and {heads.value_dim} numbers in {str(heads.dtype).removeprefix('torch.')} are too "
        f"large for attention on a card with {limits.shared_bytes} bytes of shared memory."
    )


def variants_of(
    kinds: Iterable[AttentionKind], limits: GpuLimits, *, partial: bool
) -> dict[Variant, tuple[AttentionKind, bool]]:
    """Those that layers of these kinds can ask for, at a site (`partial`) or where all pages are the stage's own. Each
    with a kind that does, and whether it is for prefill."""
    return {
        variant_of(kind, is_prefill, limits, partial): (kind, is_prefill)
        for kind in kinds
        for is_prefill in (False, True)
    }


def variant_of(
    kind: AttentionKind, is_prefill: bool, limits: GpuLimits, partial: bool, aligned: bool = True
) -> Variant:
    """The one for steps in which no sequence has more than one row, or (`is_prefill`) in which one has."""
    compiled = replace(kind, has_window=False, sinks=None) if partial else kind
    return Variant(compiled, choose_tile(kind.heads, is_prefill, limits), partial, aligned)
