"""Which attention and which linear layers a device gets."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from core.config import Settings
from core.devices import Device
from core.errors import UnsupportedModelError
from core.execution.attention.interface import AttentionBackend
from core.execution.attention.native_paged import NativePagedAttention
from core.execution.attention.torch_paged import TILE_BYTES, TorchPagedAttention, is_fused, most_bytes
from core.execution.attention.triton_probe import open_triton
from core.execution.attention.triton_variants import Heads, choose_tile
from core.execution.native import (
    NativeKernels,
    NativeLayers,
    load_native,
    pack_linears,
    packing_bytes,
    packs_weights,
    rehome,
    swap_layers,
    swap_linears,
    swap_norms,
    use_kernels,
)
from core.models.architecture import Architecture

_LIMIT_PER_TILE = 16
"""Plain torch attention takes no more than one part in so many of what a device may hold."""


@dataclass(frozen=True, slots=True)
class LinearAdapter:
    """Puts the kernels' modules in the place of a model's own."""

    kernels: NativeKernels

    @property
    def packs(self) -> bool:
        """Whether bf16 weights are packed: the kernels can, and it is the faster way here."""
        return self.kernels.packs and packs_weights(torch.bfloat16, self.kernels.instructions)

    def extra_bytes(self, model: nn.Module) -> int:
        """At most what the call takes beyond the model's parameters."""
        return packing_bytes(model) if self.packs else 0

    def rehoming(self) -> Callable[[nn.Module], None]:
        """Hands twins of modules that another stage's adapter has replaced over to this one, children first."""
        return partial(rehome, native=NativeLayers(self.kernels))

    def __call__(self, model: nn.Module) -> None:
        swap_linears(model, self.kernels)
        use_kernels(model, self.kernels)
        if self.packs:
            pack_linears(model, self.kernels)
        swap_norms(model, self.kernels)
        swap_layers(model, self.kernels)


def planned_packing(
    devices: Sequence[Device], settings: Settings, dtype: torch.dtype
) -> Callable[[nn.Module], int] | None:
    """What the adapters of these devices may take beyond a module's parameters; None if that is nothing.

    A plan does not know yet which device gets which layers, so one that packs is enough to count it everywhere.
    """
    any_kernels = settings.engine.native_kernels and any(device.kind in ("cpu", "sim") for device in devices)
    return packing_bytes if any_kernels and packs_weights(dtype, settings.engine.cpu_instructions) else None


def select_attention(
    device: Device, settings: Settings, threads: int | Callable[[], int]
) -> tuple[AttentionBackend, LinearAdapter | None]:
    """The attention backend for a device, and what replaces its linear layers (None: nothing).

    `threads` is how many a CPU device computes with, or says so at every call.
    """
    if device.kind in ("cuda", "rocm"):
        triton = open_triton(device.torch_device)
        if triton is not None:
            return triton, None
    if device.kind in ("cpu", "sim") and settings.engine.native_kernels:
        kernels = load_native(settings.runtime.cache_dir / "kernels", threads, settings.engine.cpu_instructions)
        if kernels is not None:
            return NativePagedAttention(kernels), LinearAdapter(kernels)
    return TorchPagedAttention(min(TILE_BYTES, device.memory_limit_bytes // _LIMIT_PER_TILE)), None


def planned_gathering(
    devices: Sequence[Device], settings: Settings, architecture: Architecture, max_model_len: int
) -> int:
    """Bytes that plain torch attention takes beside a step's other tensors; 0 where all devices have kernels.

    As with packing, one device that gathers is enough to count it everywhere.
    """
    tiles = [
        backend.tile_bytes
        for device in devices
        if device.is_here
        for backend in (select_attention(device, settings, 1)[0],)
        if isinstance(backend, TorchPagedAttention)
    ]
    if not tiles:
        return 0
    engine, element = settings.engine, architecture.dtype.itemsize
    keys = engine.max_batch_size * max_model_len
    kinds = {"cpu" if device.kind in ("cpu", "sim") else device.kind for device in devices}
    needed = max(
        most_bytes(
            shape.bytes_per_token(element), architecture.num_heads, shape.num_kv_heads, keys, max_model_len,
            engine.max_num_batched_tokens, all(is_fused(kind, shape.key_dim, shape.value_dim) for kind in kinds),
        )
        for shape in set(architecture.kv_shapes)
    )  # fmt: skip
    return min(needed, max(tiles))


def check_heads(devices: Sequence[Device], used: Container[str], architecture: Architecture) -> None:
    """Raises `UnsupportedModelError` if the kernel of a card that is `used`, by name, has no tile for the heads."""
    heads = {
        Heads(
            shape.num_kv_heads, architecture.num_heads // shape.num_kv_heads, shape.key_dim, shape.value_dim,
            architecture.dtype,
        )
        for shape in architecture.kv_shapes
    }  # fmt: skip
    for device in devices:
        has_kernel = device.is_here and device.name in used and device.kind in ("cuda", "rocm")
        triton = open_triton(device.torch_device) if has_kernel else None
        if triton is None:
            continue
        for each in heads:
            try:
                choose_tile(each, True, triton.limits)
            except UnsupportedModelError as error:
                raise UnsupportedModelError(f"{device.name} cannot serve {architecture.model_type}: {error}") from error


class AttentionBackends:
    """The attention backends of one engine, made when first asked for."""

    def __init__(self, settings: Settings, threads: Callable[[], int]) -> None:
        self._settings = settings
        self._threads = threads
        self._made: dict[str, tuple[AttentionBackend, LinearAdapter | None]] = {}

    def of(self, device: Device) -> tuple[AttentionBackend, LinearAdapter | None]:
        """See `select_attention`."""
        if device.name not in self._made:
            self._made[device.name] = select_attention(device, self._settings, self._threads)
        return self._made[device.name]

    def __call__(self, device: Device) -> AttentionBackend:
        return self.of(device)[0]
