"""Which attention and which linear layers a device gets."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from torch import nn

from core.config import Settings
from core.devices import Device
from core.execution.attention.interface import AttentionBackend
from core.execution.attention.native_paged import NativePagedAttention
from core.execution.attention.torch_paged import TorchPagedAttention
from core.execution.native import NativeKernels, load_native, swap_layers, swap_linears, swap_norms
from core.logs import get_logger

logger = get_logger(__name__)

LinearAdapter = Callable[[nn.Module], None]


def select_attention(
    device: Device, settings: Settings, threads: int | Callable[[], int]
) -> tuple[AttentionBackend, LinearAdapter | None]:
    """The attention backend for a device, and what replaces its linear layers (None: nothing).

    `threads` is how many a CPU device computes with, or says so at every call.
    """
    if device.kind in ("cuda", "rocm"):
        if importlib.util.find_spec("triton") is not None:
            from core.execution.attention.triton_paged import TritonPagedAttention

            return TritonPagedAttention(), None
        logger.info("attention in plain torch", device=device.name, reason="Triton is not installed")
    if device.kind in ("cpu", "sim") and settings.engine.native_kernels:
        kernels = load_native(settings.runtime.cache_dir / "kernels", threads)
        if kernels is not None:
            return NativePagedAttention(kernels), lambda model: _use_kernels(model, kernels)
    return TorchPagedAttention(), None


def _use_kernels(model: nn.Module, kernels: NativeKernels) -> None:
    swap_linears(model, kernels)
    swap_norms(model, kernels)
    swap_layers(model, kernels)
