"""Paged attention in plain torch operations: any device, the reference for the kernels.

Decodes are computed together over gathered pages; each longer sequence goes through SDPA by itself. Soft caps, sinks
and partial results, which SDPA does not know, are computed by hand in fp32, a bounded number of query rows at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from core.execution.attention.merge import Part, merge_partials
from core.execution.attention.metadata import AttentionMetadata, AttentionSpec, SiteBatch

_ROWS_BY_HAND = 256


def write_kv(
    key: torch.Tensor, value: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Store `key`, `value` `[T, num_kv_heads, dim]` in the slots."""
    k_pages.view(-1, *k_pages.shape[2:]).index_copy_(0, slot_mapping, key)
    v_pages.view(-1, *v_pages.shape[2:]).index_copy_(0, slot_mapping, value)


class TorchPagedAttention:
    """See the module. Stateless."""

    name = "torch"

    def write(
        self, key: torch.Tensor, value: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> None:  # fmt: skip
        write_kv(key, value, k_pages, v_pages, metadata.slot_mapping)

    def attend(
        self, query: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> torch.Tensor:  # fmt: skip
        """`query` `[T, num_heads, key_dim]` to `[T, num_heads, value_dim]`; this step's K and V are in the pages."""
        output = query.new_empty(query.shape[0], query.shape[1], v_pages.shape[-1])
        decodes = metadata.num_decodes
        if decodes:
            output[:decodes] = _decode(query[:decodes], k_pages, v_pages, metadata, spec)
        starts = metadata.host_query_start
        for index in range(decodes, len(metadata.host_seq_lens)):
            rows = slice(starts[index], starts[index + 1])
            output[rows] = _prefill(query[rows], k_pages, v_pages, metadata, index, spec)
        return output

    def attend_partial(
        self, query: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, site: SiteBatch, spec: AttentionSpec
    ) -> Part:
        """See `AttentionBackend.attend_partial`."""
        output = query.new_zeros((*query.shape[:2], v_pages.shape[-1]), dtype=torch.float32)
        lse = query.new_full(query.shape[:2], float("-inf"), dtype=torch.float32)
        lo, hi = site.bounds(spec.window)
        for first, last in _runs(site.host_query_start, site.host_seq_lens):
            longest = max(site.host_seq_lens[first:last])
            if longest == 0:
                continue
            tables = site.block_tables[first:last, : -(-longest // site.block_size)].long()
            key = k_pages[tables].flatten(1, 2)[:, :longest].transpose(1, 2)  # [B, Hkv, L, D]
            value = v_pages[tables].flatten(1, 2)[:, :longest].transpose(1, 2)
            keys = torch.arange(longest, device=query.device)
            begin, end, count = site.host_query_start[first], site.host_query_start[last], last - first
            for at in range(begin, end, _ROWS_BY_HAND * count):
                rows = slice(at, min(end, at + _ROWS_BY_HAND * count))
                packed = query[rows].reshape(count, -1, *query.shape[1:]).transpose(1, 2)  # [B, Hq, q, D]
                visible = (keys >= lo[rows, None]) & (keys < hi[rows, None])
                visible = visible.view(count, -1, longest)  # [B, q, L]
                out, part_lse = _attend_part(packed, key, value, visible, spec)
                output[rows] = out.transpose(1, 2).flatten(0, 1)
                lse[rows] = part_lse.transpose(1, 2).flatten(0, 1)
        return output, lse

    def merge(self, parts: Sequence[Part], sinks: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """See `AttentionBackend.merge`."""
        return merge_partials(parts, sinks, dtype)


def _runs(starts: tuple[int, ...], lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """Ranges of sequences to compute together: the leading ones with a single row, then each by itself."""
    singles = 0
    while singles < len(lengths) and starts[singles + 1] - starts[singles] == 1:
        singles += 1
    rest = [(index, index + 1) for index in range(singles, len(lengths))]
    return [(0, singles), *rest] if singles else rest


def _decode(
    query: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, metadata: AttentionMetadata, spec: AttentionSpec
) -> torch.Tensor:
    """`query` `[S, Hq, D]`, one row per sequence, to `[S, Hq, Dv]`."""
    count, block_size = query.shape[0], k_pages.shape[1]
    longest = max(metadata.host_seq_lens[:count])
    tables = metadata.block_tables[:count, : -(-longest // block_size)].long()
    key = k_pages[tables].flatten(1, 2)[:, :longest]  # [S, L, Hkv, D]
    value = v_pages[tables].flatten(1, 2)[:, :longest]
    position = metadata.seq_lens[:count, None].long() - 1
    visible = _visible(position, torch.arange(longest, device=query.device)[None], spec.window)  # [S, L]
    scores_mask = visible[:, None, None, :]
    return _attend(query[:, :, None], key.transpose(1, 2), value.transpose(1, 2), scores_mask, spec)[:, :, 0]


def _prefill(
    query: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, metadata: AttentionMetadata, index: int,
    spec: AttentionSpec,
) -> torch.Tensor:  # fmt: skip
    """`query` `[q, Hq, D]`, the last `q` positions of sequence `index`, to `[q, Hq, Dv]`."""
    length, rows, block_size = metadata.host_seq_lens[index], query.shape[0], k_pages.shape[1]
    table = metadata.block_tables[index, : -(-length // block_size)].long()
    key = k_pages[table].flatten(0, 1)[:length].transpose(0, 1)[None]  # [1, Hkv, L, D]
    value = v_pages[table].flatten(0, 1)[:length].transpose(0, 1)[None]
    packed = query.transpose(0, 1)[None]
    if rows == length and spec.window is None and spec.softcap is None and spec.sinks is None:
        grouped = packed.shape[1] != key.shape[1]
        output = F.scaled_dot_product_attention(
            packed, key, value, is_causal=True, scale=spec.scale, enable_gqa=grouped
        )
        return output[0].transpose(0, 1)
    keys_at = torch.arange(length, device=query.device)
    parts = []
    for first in range(0, rows, _ROWS_BY_HAND):
        chunk = packed[:, :, first : first + _ROWS_BY_HAND]
        at = torch.arange(length - rows + first, length - rows + first + chunk.shape[2], device=query.device)
        mask = _visible(at[:, None], keys_at[None], spec.window)
        parts.append(_attend(chunk, key, value, mask, spec))
    return torch.cat(parts, dim=2)[0].transpose(0, 1)


def _visible(query_at: torch.Tensor, keys_at: torch.Tensor, window: int | None) -> torch.Tensor:
    """Causal, and no further back than the window."""
    visible = keys_at <= query_at
    if window is not None:
        visible = visible & (keys_at > query_at - window)
    return visible


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor, spec: AttentionSpec
) -> torch.Tensor:
    """`query` `[B, Hq, q, D]`, `key`, `value` `[B, Hkv, L, D]`, `visible` broadcastable to `[B, Hq, q, L]`."""
    grouped = query.shape[1] != key.shape[1]
    if spec.softcap is None and spec.sinks is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, scale=spec.scale, enable_gqa=grouped
        )
    groups = query.shape[1] // key.shape[1]
    key = key.float().repeat_interleave(groups, dim=1)
    value = value.float().repeat_interleave(groups, dim=1)
    scores = query.float() @ key.transpose(-1, -2) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if spec.sinks is not None:
        sinks = spec.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    return (weights @ value).to(query.dtype)


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
