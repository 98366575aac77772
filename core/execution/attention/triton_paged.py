"""Paged attention as one Triton kernel, for CUDA and ROCm: decodes and prefill chunks alike.

A program takes one sequence, one KV head and a block of its query positions; the query heads that share the KV head
are rows of the same tile, so K and V are read once for all of them. It walks the visible part of the sequence page by
page with an online softmax in fp32 (Milakov and Gimelshein 2018, as in FlashAttention).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from core.execution.attention.merge import Part, merge_partials
from core.execution.attention.metadata import AttentionMetadata, AttentionSpec, SiteBatch
from core.execution.attention.torch_paged import write_kv

_PREFILL_ROWS = 64
_KEYS = 64
_MIN_TILE = 16  # tl.dot's smallest side


@triton.jit
def _paged_attention(
    out, lse, query, k_pages, v_pages, tables, query_start, seq_lens, row_lo, row_hi, sinks, scale, softcap, window,
    query_row, query_head, out_row, out_head, lse_row, k_slot, k_head, v_slot, v_head, table_row,
    GROUP: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_KEY: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, PAGE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_BOUNDS: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    sequence, kv_head, q_block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(query_start + sequence)
    q_len = tl.load(query_start + sequence + 1) - start
    if q_block * BLOCK_Q >= q_len:
        return
    kv_len = tl.load(seq_lens + sequence)

    rows = tl.arange(0, BLOCK_M)  # query position major, head of the group minor
    q_index = q_block * BLOCK_Q + rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    row_ok = (rows < BLOCK_Q * GROUP) & (q_index < q_len)
    position = kv_len - q_len + q_index
    key_at, value_at, keys = tl.arange(0, BLOCK_KEY), tl.arange(0, BLOCK_VALUE), tl.arange(0, BLOCK_N)
    q_from = query + (start + q_index)[:, None].to(tl.int64) * query_row + head[:, None] * query_head + key_at[None]
    q = tl.load(q_from, mask=row_ok[:, None] & (key_at < KEY_DIM)[None], other=0.0)

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_VALUE], tl.float32)
    first = 0
    if HAS_WINDOW:
        oldest = tl.maximum(kv_len - q_len + q_block * BLOCK_Q - window + 1, 0)
        first = oldest // BLOCK_N * BLOCK_N
    last = tl.minimum(kv_len, kv_len - q_len + (q_block + 1) * BLOCK_Q)
    if HAS_BOUNDS:
        lo = tl.load(row_lo + start + q_index, mask=row_ok, other=2147483647)
        hi = tl.load(row_hi + start + q_index, mask=row_ok, other=0)
        first = tl.min(lo) // BLOCK_N * BLOCK_N
        last = tl.minimum(kv_len, tl.max(hi))
    for n in range(first, last, BLOCK_N):
        token = n + keys
        token_ok = token < last
        page = tl.load(tables + sequence * table_row + token // PAGE, mask=token_ok, other=0)
        slot = page.to(tl.int64) * PAGE + token % PAGE
        k_from = k_pages + slot[None] * k_slot + kv_head * k_head + key_at[:, None]
        k = tl.load(k_from, mask=token_ok[None] & (key_at < KEY_DIM)[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if HAS_SOFTCAP:
            bounded = 1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0)  # tanh
            scores = softcap * bounded
        if HAS_BOUNDS:
            visible = (token[None] >= lo[:, None]) & (token[None] < hi[:, None])
        else:
            visible = token[None] <= position[:, None]
            if HAS_WINDOW:
                visible = visible & (token[None] > position[:, None] - window)
        visible = visible & token_ok[None]
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - base[:, None])
        shrink = tl.exp(highest - base)
        v_from = v_pages + slot[:, None] * v_slot + kv_head * v_head + value_at[None]
        v = tl.load(v_from, mask=token_ok[:, None] & (value_at < VALUE_DIM)[None], other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(weights, 1)
        highest = higher
    if HAS_LSE:
        seen = tl.where(total == 0.0, 1.0, total)
        tl.store(lse + (start + q_index).to(tl.int64) * lse_row + head, highest + tl.log(seen), mask=row_ok)
    if HAS_SINKS:
        sink = tl.load(sinks + head, mask=row_ok, other=0.0).to(tl.float32)
        total += tl.exp(sink - tl.where(highest == float("-inf"), 0.0, highest))
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    to = out + (start + q_index)[:, None].to(tl.int64) * out_row + head[:, None] * out_head + value_at[None]
    tl.store(to, acc.to(out.dtype.element_ty), mask=row_ok[:, None] & (value_at < VALUE_DIM)[None])


class TritonPagedAttention:
    """See the module. Shapes as in `core.execution.attention.torch_paged`."""

    name = "triton"

    def write(
        self, key: torch.Tensor, value: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> None:  # fmt: skip
        write_kv(key, value, k_pages, v_pages, metadata.slot_mapping)

    def attend(
        self, query: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> torch.Tensor:  # fmt: skip
        """One launch for the whole packed batch."""
        output = query.new_empty(query.shape[0], query.shape[1], v_pages.shape[-1])
        _launch(output, None, query, k_pages, v_pages, metadata, spec)
        return output

    def attend_partial(
        self, query: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, site: SiteBatch, spec: AttentionSpec
    ) -> Part:
        """See `AttentionBackend.attend_partial`."""
        output = query.new_empty((*query.shape[:2], v_pages.shape[-1]), dtype=torch.float32)
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        if query.shape[0]:
            _launch(output, lse, query, k_pages, v_pages, site, spec)
        return output, lse

    def merge(self, parts: Sequence[Part], sinks: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """See `AttentionBackend.merge`."""
        return merge_partials(parts, sinks, dtype)


def _launch(
    output: torch.Tensor, lse: torch.Tensor | None, query: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor,
    batch: AttentionMetadata | SiteBatch, spec: AttentionSpec,
) -> None:  # fmt: skip
    """Fills `output` and `lse`. A site's bounds stand for causality and window, and sinks are left out."""
    longest = max(last - first for first, last in itertools.pairwise(batch.host_query_start))
    query = query if query.stride(-1) == 1 else query.contiguous()
    kv_heads, group = k_pages.shape[2], query.shape[1] // k_pages.shape[2]
    block_q = 1 if longest == 1 else max(1, _PREFILL_ROWS // triton.next_power_of_2(group))
    grid = (len(batch.host_seq_lens), kv_heads, triton.cdiv(longest, block_q))
    at_site = isinstance(batch, SiteBatch)
    row_lo, row_hi = batch.bounds(spec.window) if isinstance(batch, SiteBatch) else (None, None)
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():  # launches go to the current device
        _paged_attention[grid](
            output, lse, query, k_pages, v_pages, batch.block_tables, batch.query_start, batch.seq_lens, row_lo, row_hi,
            None if at_site else spec.sinks, spec.scale, spec.softcap or 0.0, spec.window or 0,
            query.stride(0), query.stride(1), output.stride(0), output.stride(1), 0 if lse is None else lse.stride(0),
            k_pages.stride(1), k_pages.stride(2), v_pages.stride(1), v_pages.stride(2), batch.block_tables.stride(0),
            GROUP=group, KEY_DIM=k_pages.shape[-1], VALUE_DIM=v_pages.shape[-1],
            BLOCK_KEY=max(_MIN_TILE, triton.next_power_of_2(k_pages.shape[-1])),
            BLOCK_VALUE=max(_MIN_TILE, triton.next_power_of_2(v_pages.shape[-1])), PAGE=k_pages.shape[1],
            BLOCK_Q=block_q, BLOCK_M=max(_MIN_TILE, triton.next_power_of_2(block_q * group)), BLOCK_N=_KEYS,
            HAS_WINDOW=spec.window is not None and not at_site, HAS_SOFTCAP=spec.softcap is not None,
            HAS_SINKS=spec.sinks is not None and not at_site, HAS_BOUNDS=at_site, HAS_LSE=lse is not None,
        )  # fmt: skip
