"""Paged attention in the compiled CPU kernels: pages are read where they are, nothing is gathered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from core.execution.attention.interface import OnKernel
from core.execution.attention.merge import Part
from core.execution.attention.metadata import AttentionMetadata, AttentionSpec, SiteBatch
from core.execution.attention.triton_variants import AttentionKind
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

    def attend_partial(
        self, query: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, site: SiteBatch, spec: AttentionSpec
    ) -> Part:
        """See `AttentionBackend.attend_partial`."""
        return self._kernels.paged_attention(
            query, k_pages, v_pages, site.block_tables, site.query_start, site.seq_lens, spec.scale,
            softcap=spec.softcap or 0.0, bounds=site.bounds(spec.window),
        )  # fmt: skip

    def merge(self, parts: Sequence[Part], sinks: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """See `AttentionBackend.merge`."""
        return self._kernels.merge_partials(parts, sinks, dtype)

    def warm_up(
        self, kinds: Iterable[AttentionKind], device: torch.device, *, partial: bool, on_kernel: OnKernel
    ) -> None:
        """See `AttentionBackend.warm_up`: nothing has to be made ready."""
