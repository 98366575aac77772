"""Paged attention in the compiled CPU kernels: pages are read where they are, nothing is gathered."""

from __future__ import annotations

import torch

from core.execution.attention.metadata import AttentionMetadata, AttentionSpec
from core.execution.native import NativeKernels


class NativePagedAttention:
    """Shapes as in `core.execution.attention.torch_paged`."""

    name = "native"

    def __init__(self, kernels: NativeKernels) -> None:
        self._kernels = kernels

    def write(
        self, key: torch.Tensor, value: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> None:  # fmt: skip
        self._kernels.write_kv(key, value, k_pages, v_pages, metadata.slot_mapping)

    def attend(
        self, query: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> torch.Tensor:  # fmt: skip
        output, _ = self._kernels.paged_attention(
            query, k_pages, v_pages, metadata.block_tables, metadata.query_start, metadata.seq_lens, spec.scale,
            sliding_window=spec.window or 0, softcap=spec.softcap or 0.0, sinks=spec.sinks,
        )  # fmt: skip
        return output
