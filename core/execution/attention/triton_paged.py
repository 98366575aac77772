"""Paged attention as one Triton kernel, for CUDA and ROCm: decodes and prefill chunks alike.

A program takes one sequence, one KV head and a block of its query positions; the query heads that share the KV head
are rows of the same tile, so K and V are read once for all of them (or for as many as a tile has rows). It walks the
visible part of the sequence page by page with an online softmax in fp32 (Milakov and Gimelshein 2018, as in
FlashAttention).

Triton compiles a kernel anew for each set of constants, and for arguments that are 1, or multiples of 16, or at such
addresses. Here constants alone tell kernels apart (`core.execution.attention.triton_variants`): strides follow from
them, and no argument is specialized.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from contextlib import nullcontext

import numpy as np
import torch
import triton
import triton.language as tl

from core.execution.attention.interface import OnKernel
from core.execution.attention.merge import Part
from core.execution.attention.metadata import AttentionMetadata, AttentionSpec, SiteBatch, build_site_batch
from core.execution.attention.torch_paged import TorchPages
from core.execution.attention.triton_variants import (
    AttentionKind,
    GpuLimits,
    Variant,
    kind_of,
    padded_dim,
    variant_of,
    variants_of,
)

_ALIGNMENT = 16
_ARGUMENTS = (
    "out", "lse", "query", "k_pages", "v_pages", "tables", "query_start", "seq_lens", "row_lo", "row_hi", "sinks",
    "scale", "softcap", "window", "table_row",
)  # fmt: skip


@triton.jit(do_not_specialize=_ARGUMENTS)
def _paged_attention(
    out, lse, query, k_pages, v_pages, tables, query_start, seq_lens, row_lo, row_hi, sinks, scale, softcap, window,
    table_row,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_KEY: tl.constexpr, BLOCK_VALUE: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, KEY_ALIGN: tl.constexpr, VALUE_ALIGN: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, IS_PARTIAL: tl.constexpr,
):  # fmt: skip
    BLOCK_Q: tl.constexpr = BLOCK_M // HEADS
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    sequence, kv_head, q_block = tl.program_id(0), tl.program_id(1) // PARTS, tl.program_id(2)
    start = tl.load(query_start + sequence)
    q_len = tl.load(query_start + sequence + 1) - start
    if q_block * BLOCK_Q >= q_len:
        return
    kv_len = tl.load(seq_lens + sequence)

    rows = tl.arange(0, BLOCK_M)  # query position major, head of the group minor
    q_index = q_block * BLOCK_Q + rows // HEADS
    in_group = tl.program_id(1) % PARTS * HEADS + rows % HEADS
    row_ok = (in_group < GROUP) & (q_index < q_len)
    position = kv_len - q_len + q_index
    # Queries and results lie densely, [T, KV_HEADS * GROUP, dim].
    token_row = (start + q_index).to(tl.int64) * (KV_HEADS * GROUP)
    head = kv_head * GROUP + in_group
    key_at, value_at, keys = tl.arange(0, BLOCK_KEY), tl.arange(0, BLOCK_VALUE), tl.arange(0, BLOCK_N)
    q_head = query + kv_head * GROUP * KEY_DIM
    k_head, v_head = k_pages + kv_head * KEY_DIM, v_pages + kv_head * VALUE_DIM
    if KEY_ALIGN > 1:
        q_head, k_head = tl.multiple_of(q_head, KEY_ALIGN), tl.multiple_of(k_head, KEY_ALIGN)
    if VALUE_ALIGN > 1:
        v_head = tl.multiple_of(v_head, VALUE_ALIGN)
    q_from = q_head + (token_row + in_group)[:, None] * KEY_DIM + key_at[None]
    q = tl.load(q_from, mask=row_ok[:, None] & (key_at < KEY_DIM)[None], other=0.0)

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_VALUE], tl.float32)
    first = 0
    if HAS_WINDOW:
        oldest = tl.maximum(kv_len - q_len + q_block * BLOCK_Q - window + 1, 0)
        first = oldest // BLOCK_N * BLOCK_N
    last = tl.minimum(kv_len, kv_len - q_len + (q_block + 1) * BLOCK_Q)
    if IS_PARTIAL:
        lo = tl.load(row_lo + start + q_index, mask=row_ok, other=2147483647)
        hi = tl.load(row_hi + start + q_index, mask=row_ok, other=0)
        first = tl.min(lo) // BLOCK_N * BLOCK_N
        last = tl.minimum(kv_len, tl.max(hi))
    for n in range(first, last, BLOCK_N):
        token = n + keys
        token_ok = token < last
        page = tl.load(tables + sequence * table_row + token // PAGE, mask=token_ok, other=0)
        slot = (page.to(tl.int64) * PAGE + token % PAGE) * KV_HEADS
        k_from = k_head + slot[None] * KEY_DIM + key_at[:, None]
        k = tl.load(k_from, mask=token_ok[None] & (key_at < KEY_DIM)[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if HAS_SOFTCAP:
            bounded = 1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0)  # tanh
            scores = softcap * bounded
        if IS_PARTIAL:
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
        v_from = v_head + slot[:, None] * VALUE_DIM + value_at[None]
        v = tl.load(v_from, mask=token_ok[:, None] & (value_at < VALUE_DIM)[None], other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(weights, 1)
        highest = higher
    if IS_PARTIAL:
        seen = tl.where(total == 0.0, 1.0, total)
        tl.store(lse + token_row + head, highest + tl.log(seen), mask=row_ok)
    if HAS_SINKS:
        sink = tl.load(sinks + head, mask=row_ok, other=0.0).to(tl.float32)
        total += tl.exp(sink - tl.where(highest == float("-inf"), 0.0, highest))
    out_head = out + kv_head * GROUP * VALUE_DIM
    if VALUE_ALIGN > 1:
        out_head = tl.multiple_of(out_head, VALUE_ALIGN)
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    to = out_head + (token_row + in_group)[:, None] * VALUE_DIM + value_at[None]
    tl.store(to, acc.to(out.dtype.element_ty), mask=row_ok[:, None] & (value_at < VALUE_DIM)[None])


def constants(variant: Variant) -> dict[str, int | bool]:
    """What is compiled into a variant's kernel, by the kernel's names."""
    kind, heads = variant.kind, variant.kind.heads
    size = heads.dtype.itemsize

    def alignment(dim: int) -> int:
        return _ALIGNMENT if variant.is_aligned and dim * size % _ALIGNMENT == 0 else 1

    return {
        "KV_HEADS": heads.num_kv_heads, "GROUP": heads.group, "HEADS": variant.heads_per_tile,
        "KEY_DIM": heads.key_dim, "VALUE_DIM": heads.value_dim, "BLOCK_KEY": padded_dim(heads.key_dim),
        "BLOCK_VALUE": padded_dim(heads.value_dim), "PAGE": kind.block_size, "BLOCK_M": variant.tile.rows,
        "BLOCK_N": variant.tile.keys, "KEY_ALIGN": alignment(heads.key_dim), "VALUE_ALIGN": alignment(heads.value_dim),
        "HAS_WINDOW": kind.has_window, "HAS_SOFTCAP": kind.has_softcap, "HAS_SINKS": kind.sinks is not None,
        "IS_PARTIAL": variant.is_partial,
    }  # fmt: skip


def options(variant: Variant) -> dict[str, int | bool]:
    """How a variant's kernel is compiled. Products and sums are fused, whatever Triton's default comes to be."""
    return {"num_warps": variant.tile.warps, "num_stages": variant.tile.stages, "enable_fp_fusion": True}


@functools.lru_cache(maxsize=256)
def _compiled_in(variant: Variant) -> dict[str, int | bool]:
    return constants(variant) | options(variant)


class TritonPagedAttention(TorchPages):
    """See the module. Shapes as in `core.execution.attention.torch_paged`."""

    name = "triton"

    def __init__(self, limits: GpuLimits) -> None:
        self.limits = limits
        self._variant_of = functools.lru_cache(maxsize=256)(variant_of)

    def attend(
        self, query: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> torch.Tensor:  # fmt: skip
        """One launch for the whole packed batch."""
        output = query.new_empty(query.shape[0], query.shape[1], v_pages.shape[-1])
        self._launch(output, None, query, k_pages, v_pages, metadata, spec)
        return output

    def attend_partial(
        self, query: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, site: SiteBatch, spec: AttentionSpec
    ) -> Part:
        """See `AttentionBackend.attend_partial`."""
        output = query.new_empty((*query.shape[:2], v_pages.shape[-1]), dtype=torch.float32)
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        if query.shape[0]:
            self._launch(output, lse, query, k_pages, v_pages, site, spec)
        return output, lse

    def warm_up(
        self, kinds: Iterable[AttentionKind], device: torch.device, *, partial: bool, on_kernel: OnKernel
    ) -> None:
        """See `AttentionBackend.warm_up`. Each kernel is launched once, because compiling alone leaves loading it, and
        finding out whether the card takes it, to the first launch."""
        wanted = variants_of(kinds, self.limits, partial=partial)
        for done, (kind, is_prefill) in enumerate(wanted.values(), start=1):
            self._launch_once(kind, 2 if is_prefill else 1, device, partial)
            on_kernel(done, len(wanted))
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def _launch_once(self, kind: AttentionKind, rows: int, device: torch.device, partial: bool) -> None:
        """For one sequence of so many tokens, in pages of its own."""
        heads, pages = kind.heads, -(-rows // kind.block_size)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=heads.dtype, device=device)

        query = zeros(rows, heads.num_kv_heads * heads.group, heads.key_dim)
        k_pages, v_pages = (
            zeros(pages, kind.block_size, heads.num_kv_heads, dim) for dim in (heads.key_dim, heads.value_dim)
        )
        sinks = None if kind.sinks is None else torch.zeros(query.shape[1], dtype=kind.sinks, device=device)
        spec = AttentionSpec(1.0, 1 if kind.has_window else None, 1.0 if kind.has_softcap else None, sinks)
        index = np.arange(pages, dtype=np.int32)
        site = build_site_batch([index], [index], [rows], [rows], np.arange(rows), kind.block_size, device)
        if partial:
            self.attend_partial(query, k_pages, v_pages, site, spec)
            return
        metadata = AttentionMetadata(
            site.query_start, site.block_tables, site.query_start, site.seq_lens, 2 - rows, site.host_query_start,
            site.host_seq_lens, site.max_query_len,
        )  # fmt: skip
        self.attend(query, k_pages, v_pages, metadata, spec)

    def _launch(
        self, output: torch.Tensor, lse: torch.Tensor | None, query: torch.Tensor, k_pages: torch.Tensor,
        v_pages: torch.Tensor, batch: AttentionMetadata | SiteBatch, spec: AttentionSpec,
    ) -> None:  # fmt: skip
        """Fills `output` and `lse`. A site's bounds stand for causality and window, and sinks are left out."""
        kind = kind_of(query, k_pages, v_pages, spec)
        query = query.contiguous()
        if query.data_ptr() % _ALIGNMENT:
            query = query.clone()
        is_aligned = (query.data_ptr() | k_pages.data_ptr() | v_pages.data_ptr() | output.data_ptr()) % _ALIGNMENT == 0
        variant = self._variant_of(kind, batch.max_query_len > 1, self.limits, lse is not None, is_aligned)
        row_lo, row_hi = batch.bounds(spec.window) if isinstance(batch, SiteBatch) else (None, None)
        grid = (
            len(batch.host_seq_lens),
            kind.heads.num_kv_heads * triton.cdiv(kind.heads.group, variant.heads_per_tile),
            triton.cdiv(batch.max_query_len, variant.queries_per_tile),
        )
        with torch.cuda.device(query.device) if query.is_cuda else nullcontext():  # launches go to the current device
            _paged_attention[grid](
                output, lse, query, k_pages, v_pages, batch.block_tables, batch.query_start, batch.seq_lens, row_lo,
                row_hi, spec.sinks if variant.kind.sinks is not None else None, float(spec.scale),
                float(spec.softcap or 0), spec.window or 0, batch.block_tables.stride(0), **_compiled_in(variant),
            )  # fmt: skip
