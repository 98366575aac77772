"""Paged attention in plain torch operations: any device, the reference for the kernels.

Pages are gathered, and SDPA computes: decodes of about one length together, longer runs of rows a bounded number at a
time. What SDPA does not know (soft caps, sinks, partial results), or what would take more than a given number of bytes
beside the output, goes over the keys tile by tile, in fp32, and the tiles' results are merged as those of several sites
are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F

from core.execution.attention.interface import OnKernel
from core.execution.attention.merge import Part, combine, merge_partials
from core.execution.attention.metadata import AttentionMetadata, AttentionSpec, SiteBatch
from core.execution.attention.triton_variants import AttentionKind

TILE_BYTES = 256 * 1024 * 1024
"""What attention takes at one time beside its output, if it is given no less."""

_ROWS = 256
"""Query rows of one sequence that are computed together."""

_SEQUENCES = 32
"""Sequences with one row each that go over the keys together."""

_UNLIKE = 4
"""Sequences this many times as long as others are computed without them: all are as long as the longest there."""

_SCORE_BYTES = 18
"""Of a score: several times in fp32."""


def most_bytes(
    kv_bytes_per_token: int, heads: int, kv_heads: int, keys: int, longest: int, rows: int, fused: bool
) -> int:
    """At most what attention of one layer would take beside its output if it went over all keys at one time.

    Args:
        kv_bytes_per_token: of the layer.
        heads, kv_heads: of the query, and of K and V.
        keys: of all sequences that may be computed at one time, each as long as the longest.
        longest: tokens of a sequence.
        rows: of a step, all sequences together.
        fused: whether SDPA computes without keeping scores, see `is_fused`.
    """
    gathered = keys * kv_bytes_per_token * (5 if fused else 1 + 3 * (heads // kv_heads))  # copies in fp32
    return gathered + heads * min(rows, _ROWS) * longest * _SCORE_BYTES


def is_fused(device_type: str, key_dim: int, value_dim: int) -> bool:
    """Whether SDPA is sure to keep no scores and to repeat no heads: on the CPU, with K as wide as V."""
    return device_type == "cpu" and key_dim == value_dim


class TorchPages:
    """The parts of a backend that torch's own operations do."""

    def write(
        self, key: torch.Tensor, value: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> None:  # fmt: skip
        """Store `key`, `value` `[T, num_kv_heads, dim]` in the slots."""
        k_pages.view(-1, *k_pages.shape[2:]).index_copy_(0, metadata.slot_mapping, key)
        v_pages.view(-1, *v_pages.shape[2:]).index_copy_(0, metadata.slot_mapping, value)

    def merge(self, parts: Sequence[Part], sinks: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """See `AttentionBackend.merge`."""
        return merge_partials(parts, sinks, dtype)


class TorchPagedAttention(TorchPages):
    """See the module. It takes up to `tile_bytes` beside its output, or what a page of each sequence needs."""

    name = "torch"

    def __init__(self, tile_bytes: int | None = None) -> None:
        self.tile_bytes = TILE_BYTES if tile_bytes is None else tile_bytes

    def attend(
        self, query: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> torch.Tensor:  # fmt: skip
        """`query` `[T, num_heads, key_dim]` to `[T, num_heads, value_dim]`; this step's K and V are in the pages."""
        output = query.new_empty(query.shape[0], query.shape[1], v_pages.shape[-1])
        pages = _Pages(k_pages, v_pages, query, self.tile_bytes)
        lengths, decodes = metadata.host_seq_lens, metadata.num_decodes
        for group in _groups(lengths[:decodes], pages):
            at = slice(decodes) if len(group) == decodes else torch.tensor(group, device=query.device)
            tables, last = metadata.block_tables[at], metadata.seq_lens[at, None].long() - 1
            longest = max(lengths[index] for index in group)
            output[at] = _attend(query[at][:, None], pages, tables, last, longest, spec).flatten(0, 1)
        starts = metadata.host_query_start
        for index in range(decodes, len(lengths)):
            tables, end = metadata.block_tables[index : index + 1], starts[index + 1]
            first = lengths[index] - (end - starts[index])  # position of the first row
            is_plain = spec.window is None and spec.softcap is None and spec.sinks is None
            if first == 0 and is_plain and pages.fit(1, lengths[index], lengths[index]):
                output[starts[index] : end] = _whole_prompt(query[starts[index] : end], pages, tables[0], spec)
                continue
            for row in range(starts[index], end, _ROWS):
                rows = slice(row, min(row + _ROWS, end))
                at_first, at_last = first + row - starts[index], first + rows.stop - starts[index]
                positions = torch.arange(at_first, at_last, device=query.device)[None]
                output[rows] = _attend(query[rows][None], pages, tables, positions, at_last, spec)[0]
        return output

    def attend_partial(
        self, query: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, site: SiteBatch, spec: AttentionSpec
    ) -> Part:
        """See `AttentionBackend.attend_partial`."""
        output = query.new_zeros((*query.shape[:2], v_pages.shape[-1]), dtype=torch.float32)
        lse = query.new_full(query.shape[:2], float("-inf"), dtype=torch.float32)
        pages, (lo, hi) = _Pages(k_pages, v_pages, query, self.tile_bytes), site.bounds(spec.window)
        for first, last, rows in _runs(site.host_query_start, site.host_seq_lens):
            longest = max(site.host_seq_lens[first:last])
            if longest == 0:
                continue
            shape = (last - first, (rows.stop - rows.start) // (last - first))
            packed, bounds = query[rows].view(*shape, *query.shape[1:]), (lo[rows].view(shape), hi[rows].view(shape))
            output[rows], lse[rows] = _over_tiles(packed, pages, site.block_tables[first:last], bounds, longest, spec)
        return output, lse

    def warm_up(
        self, kinds: Iterable[AttentionKind], device: torch.device, *, partial: bool, on_kernel: OnKernel
    ) -> None:
        """See `AttentionBackend.warm_up`: nothing has to be made ready."""


class _Pages:
    """K and V pages, and what computing with them takes for queries like `query` `[.., Hq, D]`."""

    def __init__(self, k_pages: torch.Tensor, v_pages: torch.Tensor, query: torch.Tensor, tile_bytes: int) -> None:
        self._tile_bytes = tile_bytes
        self.k, self.v, self.block_size, self.heads = k_pages, v_pages, k_pages.shape[1], query.shape[1]
        self.is_grouped = self.heads != k_pages.shape[2]
        self._per_key = k_pages.shape[2] * (k_pages.shape[3] + v_pages.shape[3])
        self._itemsize = k_pages.element_size()
        fused = is_fused(query.device.type, k_pages.shape[3], v_pages.shape[3])
        # Otherwise K and V may be repeated for every head and made fp32, and scores and weights are kept.
        repeated = 0 if fused else self.heads // k_pages.shape[2] * (self._itemsize + 4)
        self._gathered_bytes = self._per_key * (self._itemsize + repeated)
        self._score_bytes = 0 if fused else 12

    def fit(self, sequences: int, rows: int, keys: int) -> bool:
        """Whether SDPA can have them all at one time."""
        mask = rows * (2 + self._itemsize)
        per_key = self._gathered_bytes + self.heads * rows * self._score_bytes + mask
        return sequences * keys * per_key <= self._tile_bytes

    def tile(self, sequences: int, rows: int) -> int:
        """Keys to go over at one time, whole pages: gathered, in fp32 (perhaps twice), and some scores of each."""
        per_key = sequences * (self._per_key * (self._itemsize + 8) + self.heads * rows * 16 + 2 * rows)
        return max(1, self._tile_bytes // (per_key * self.block_size)) * self.block_size

    def gather(self, tables: torch.Tensor, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values number `first .. last - 1`, `first` on a page's edge, of each sequence, `[B, Hkv, L, D]`."""
        blocks = tables[:, first // self.block_size : -(-last // self.block_size)].long()
        key, value = (pages[blocks].flatten(1, 2)[:, : last - first] for pages in (self.k, self.v))
        return key.transpose(1, 2), value.transpose(1, 2)


def _groups(lengths: Sequence[int], pages: _Pages) -> list[list[int]]:
    """Sequences with one row each, to be computed together: about as long as each other, and no more than fit."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        last = groups[-1] if groups else []
        is_like = bool(last) and lengths[index] <= _UNLIKE * (lengths[last[0]] + pages.block_size)
        if is_like and (len(last) < _SEQUENCES or pages.fit(len(last) + 1, 1, lengths[index])):
            last.append(index)
        else:
            groups.append([index])
    return groups


def _runs(starts: tuple[int, ...], lengths: tuple[int, ...]) -> list[tuple[int, int, slice]]:
    """Sequences to compute together, and their rows: leading ones with a single row, then rows of each by itself."""
    singles = 0
    while singles < len(lengths) and starts[singles + 1] - starts[singles] == 1:
        singles += 1
    runs = []
    for first in range(0, singles, _SEQUENCES):
        last = min(first + _SEQUENCES, singles)
        runs.append((first, last, slice(starts[first], starts[last])))
    for index in range(singles, len(lengths)):
        end = starts[index + 1]
        runs += [(index, index + 1, slice(row, min(row + _ROWS, end))) for row in range(starts[index], end, _ROWS)]
    return runs


def _whole_prompt(query: torch.Tensor, pages: _Pages, table: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """`query` `[q, Hq, D]` of all positions of a sequence, to `[q, Hq, Dv]`."""
    key, value = pages.gather(table[None], 0, query.shape[0])
    output = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None], key, value, is_causal=True, scale=spec.scale, enable_gqa=pages.is_grouped
    )
    return output[0].transpose(0, 1)


def _attend(
    query: torch.Tensor, pages: _Pages, tables: torch.Tensor, positions: torch.Tensor, longest: int, spec: AttentionSpec
) -> torch.Tensor:
    """`query` `[B, q, Hq, D]` at `positions` `[B, q]`, all before `longest`, to `[B, q, Hq, Dv]`."""
    shape = query.shape[:2]
    if spec.softcap is None and spec.sinks is None and pages.fit(shape[0], shape[1], longest):
        keys = torch.arange(longest, device=query.device)
        visible = keys <= positions[..., None]
        if spec.window is not None:
            visible &= keys > positions[..., None] - spec.window
        key, value = pages.gather(tables, 0, longest)
        output = F.scaled_dot_product_attention(
            query.transpose(1, 2), key, value, attn_mask=visible[:, None], scale=spec.scale,
            enable_gqa=pages.is_grouped,
        )  # fmt: skip
        return output.transpose(1, 2)
    hi = positions + 1
    lo = torch.zeros_like(hi) if spec.window is None else hi - spec.window
    part = _over_tiles(query, pages, tables, (lo, hi), longest, spec)
    merged = merge_partials([part], spec.sinks, query.dtype)
    return merged.view(*shape, *merged.shape[1:])


def _over_tiles(
    query: torch.Tensor, pages: _Pages, tables: torch.Tensor, bounds: tuple[torch.Tensor, torch.Tensor],
    longest: int, spec: AttentionSpec,
) -> Part:  # fmt: skip
    """`query` `[B, q, Hq, D]` over the first `longest` keys, of which a row sees those within `bounds` `[B, q]`.

    Returns fp32 `[B * q, Hq, Dv]`, and the log-sum-exp of the scores, fp32 `[B * q, Hq]`.
    """
    (lo, hi), step = bounds, pages.tile(*query.shape[:2])
    packed, total = query.transpose(1, 2), None
    for begin in range(0, longest, step):
        end = min(begin + step, longest)
        key, value = pages.gather(tables, begin, end)
        numbers = torch.arange(begin, end, device=query.device)
        visible = (numbers >= lo[..., None]) & (numbers < hi[..., None])  # [B, q, L]
        output, lse = _attend_part(packed, key, value, visible, spec)
        part = output.transpose(1, 2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)
        total = part if total is None else combine([total, part])
    assert total is not None
    return total


def _attend_part(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """`query` `[B, Hq, q, D]`, `key`, `value` `[B, Hkv, L, D]`, `visible` `[B, q, L]` to fp32 `[B, Hq, q, Dv]` and the
    log-sum-exp of the scores, fp32 `[B, Hq, q]`. Query heads of a KV head are rows of one product: K is not repeated.
    """
    batch, kv_heads, groups = query.shape[0], key.shape[1], query.shape[1] // key.shape[1]
    grouped = query.float().reshape(batch, kv_heads, -1, query.shape[-1])  # [B, Hkv, groups * q, D]
    scores = (grouped @ key.float().transpose(-1, -2) * spec.scale).view(batch, kv_heads, groups, -1, key.shape[2])
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    lse = scores.logsumexp(dim=-1)  # [B, Hkv, groups, q]
    base = lse.masked_fill(lse == float("-inf"), 0.0)  # rows without a key get weights of exp(-inf - 0) = 0
    weights = torch.exp(scores - base[..., None]).flatten(2, 3)
    output = (weights @ value.float()).view(batch, kv_heads * groups, -1, value.shape[-1])
    return output, lse.flatten(1, 2)
