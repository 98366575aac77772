"""Whether Triton's kernel works on a card: one is launched and compared with plain torch before it is counted on."""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING

import numpy as np
import torch

from core.execution.attention.metadata import AttentionMetadata, AttentionSpec, build_site_batch
from core.execution.attention.torch_paged import TorchPagedAttention
from core.execution.attention.triton_variants import GpuLimits
from core.logs import get_logger
from core.models.dtype import compute_capability

if TYPE_CHECKING:
    from core.execution.attention.triton_paged import TritonPagedAttention

logger = get_logger(__name__)

_TOLERANCE = 4e-3  # of fp16, for averages of numbers around 1
_LEAST_SHARED_BYTES = 64 * 1024
"""Every supported card has so much."""


def open_triton(torch_device: str) -> TritonPagedAttention | None:
    """The backend for a card; None if its kernel does not work there."""
    return probe_triton(torch_device)[0]


@functools.cache
def probe_triton(torch_device: str) -> tuple[TritonPagedAttention | None, str]:
    """The backend for a card; None, and the reason, which is logged, if its kernel does not work there.

    A process asks once per card, so that plans and engines go by the same answer.
    """
    try:
        if importlib.util.find_spec("triton") is None:
            raise _UnfitError("Triton is not installed")
        return _try_triton(torch.device(torch_device)), ""
    except Exception as error:  # noqa: BLE001  whatever Triton or its compiler raises, plain torch does without them
        reason = str(error) if isinstance(error, _UnfitError) else f"a Triton kernel failed: {error!r}"
        logger.warning("attention in plain torch", device=torch_device, reason=reason)
        return None, reason


class _UnfitError(Exception):
    """Why the kernel is not used."""


def _try_triton(device: torch.device) -> TritonPagedAttention:
    from core.execution.attention.triton_paged import TritonPagedAttention

    backend = TritonPagedAttention(gpu_limits(device))
    worst = _worst_difference(backend, device)
    if not worst <= _TOLERANCE:
        raise _UnfitError(f"a Triton kernel is off by {worst:.2g}, where {_TOLERANCE} is allowed")
    return backend


def gpu_limits(device: torch.device) -> GpuLimits:
    """Of the card; the least that cards have for other devices, on which Triton's interpreter runs."""
    capability = compute_capability(device)
    if device.type != "cuda":
        return GpuLimits("cuda", 75, _LEAST_SHARED_BYTES)
    properties = torch.cuda.get_device_properties(device)
    # What a kernel may ask for beyond the usual, as Triton's do; torch for ROCm does not know the word.
    shared = int(getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block)
    return GpuLimits("hip" if capability is None else "cuda", capability or 0, shared, properties.warp_size)


def _worst_difference(backend: TritonPagedAttention, device: torch.device) -> float:
    """From plain torch, for a decode and a prompt of random numbers in fp16. NaN if the kernel gives one."""
    generator = torch.Generator().manual_seed(0)
    block_size, counts = 16, (40, 35)
    query, k_pages, v_pages = (
        torch.randn(shape, generator=generator).to(torch.float16)
        for shape in ((1 + counts[1], 4, 64), (6, block_size, 2, 64), (6, block_size, 2, 64))
    )
    spec = AttentionSpec(64**-0.5)

    def batch_on(where: torch.device) -> AttentionMetadata:
        tables, index = [np.array([4, 0, 5]), np.array([1, 3, 2])], [np.arange(3)] * 2
        at = np.concatenate(([counts[0] - 1], np.arange(counts[1])))
        site = build_site_batch(tables, index, counts, (1, counts[1]), at, block_size, where)
        return AttentionMetadata(
            torch.zeros(len(at), dtype=torch.int64, device=where), site.block_tables, site.query_start, site.seq_lens,
            1, site.host_query_start, site.host_seq_lens, site.max_query_len,
        )  # fmt: skip

    got = backend.attend(query.to(device), k_pages.to(device), v_pages.to(device), batch_on(device), spec).cpu()
    expected = TorchPagedAttention().attend(
        query.float(), k_pages.float(), v_pages.float(), batch_on(torch.device("cpu")), spec
    )
    return float((got.float() - expected).abs().max())
