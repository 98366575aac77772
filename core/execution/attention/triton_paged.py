"""Paged attention as one Triton kernel, for CUDA and ROCm: decodes and prefill chunks alike.

A program takes one sequence, one KV head and a block of its query positions; the query heads that share the KV head
are rows of the same tile, so K and V are read once for all of them. It walks the visible part of the sequence page by
page with an online softmax in fp32 (Milakov and Gimelshein 2018, as in FlashAttention).
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl

from core.execution.attention.metadata import AttentionMetadata, AttentionSpec
from core.execution.attention.torch_paged import write_kv

_PREFILL_ROWS = 64
_KEYS = 64
_MIN_TILE = 16  # tl.dot's smallest side


@triton.jit
def _paged_attention(
    out, query, k_pages, v_pages, tables, query_start, seq_lens, sinks, scale, softcap, window,
    query_row, query_head, out_row, out_head, k_slot, k_head, v_slot, v_head, table_row,
    GROUP: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_KEY: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, PAGE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
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
        visible = token_ok[None] & (token[None] <= position[:, None])
        if HAS_WINDOW:
            visible = visible & (token[None] > position[:, None] - window)
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
        starts = metadata.host_query_start
        longest = max(last - first for first, last in itertools.pairwise(starts))
        query = query if query.stride(-1) == 1 else query.contiguous()
        output = query.new_empty(query.shape[0], query.shape[1], v_pages.shape[-1])
        kv_heads, group = k_pages.shape[2], query.shape[1] // k_pages.shape[2]
        block_q = 1 if longest == 1 else max(1, _PREFILL_ROWS // triton.next_power_of_2(group))
        grid = (len(metadata.host_seq_lens), kv_heads, triton.cdiv(longest, block_q))
        _paged_attention[grid](
            output, query, k_pages, v_pages, metadata.block_tables, metadata.query_start, metadata.seq_lens,
            spec.sinks, spec.scale, spec.softcap or 0.0, spec.window or 0,
            query.stride(0), query.stride(1), output.stride(0), output.stride(1), k_pages.stride(1),
            k_pages.stride(2), v_pages.stride(1), v_pages.stride(2), metadata.block_tables.stride(0),
            GROUP=group, KEY_DIM=k_pages.shape[-1], VALUE_DIM=v_pages.shape[-1],
            BLOCK_KEY=max(_MIN_TILE, triton.next_power_of_2(k_pages.shape[-1])),
            BLOCK_VALUE=max(_MIN_TILE, triton.next_power_of_2(v_pages.shape[-1])), PAGE=k_pages.shape[1],
            BLOCK_Q=block_q, BLOCK_M=max(_MIN_TILE, triton.next_power_of_2(block_q * group)), BLOCK_N=_KEYS,
            HAS_WINDOW=spec.window is not None, HAS_SOFTCAP=spec.softcap is not None,
            HAS_SINKS=spec.sinks is not None,
        )  # fmt: skip
        return output
