"""Which attention and which linear layers a device gets."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from core.config import Settings
from core.devices import Device
from core.execution.attention.interface import AttentionBackend
from core.execution.attention.torch_paged import TorchPagedAttention

LinearAdapter = Callable[[nn.Module], None]


def select_attention(device: Device, settings: Settings) -> tuple[AttentionBackend, LinearAdapter | None]:
    """The attention backend for a device, and what replaces its linear layers (None: nothing)."""
    return TorchPagedAttention(), None
