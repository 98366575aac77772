"""A layer's tensors as one run of bytes, so that they move between main memory and a device in one copy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

_ALIGNMENT = 64
"""Bytes. Tensors whose size is a multiple of it come first, so all of them begin at one."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Where a tensor lies in the run of bytes, and with which strides."""

    tensor: torch.Tensor
    start: int
    stride: tuple[int, ...]

    def view(self, run: torch.Tensor) -> torch.Tensor:
        """The tensor as a view of `run`."""
        flat = run[self.start : self.start + self.tensor.nbytes].view(self.tensor.dtype)
        return flat.as_strided(self.tensor.shape, self.stride)


class PackedLayer:
    """All parameters and buffers of `layer`, whatever its modules are.

    They stay the same tensor objects and get other memory. Modules that keep addresses of their tensors have a method
    `tensors_moved()`, which is called afterwards, of children before that of their parents.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self._parts: list[_Part] = []
        end = 0
        for tensor in sorted(_tensors(layer), key=_order):
            self._parts.append(_Part(tensor, end, _dense_stride(tensor)))
            end += tensor.nbytes
        self.nbytes = end

    def store(self, run: torch.Tensor) -> None:
        """Copy the tensors' values to `run`, uint8 `[nbytes]`."""
        for part in self._parts:
            part.view(run).copy_(part.tensor)

    def move(self, run: torch.Tensor) -> None:
        """Make the tensors views of `run`, uint8 `[nbytes]` or longer; their values are what it holds."""
        for part in self._parts:
            part.tensor.data = part.view(run)
        for module in reversed(list(self.layer.modules())):
            moved = getattr(module, "tensors_moved", None)
            if moved is not None:
                moved()


def _tensors(layer: nn.Module) -> Iterator[torch.Tensor]:
    """Each once, without those that hold nothing."""
    unique = {id(tensor): tensor for group in (layer.parameters(), layer.buffers()) for tensor in group}
    return (tensor for tensor in unique.values() if tensor.nbytes)


def _order(tensor: torch.Tensor) -> tuple[bool, int, int]:
    """With element sizes falling, every tensor begins at a multiple of its own, and no byte lies between two."""
    return tensor.nbytes % _ALIGNMENT != 0, -tensor.element_size(), -tensor.nbytes


def _dense_stride(tensor: torch.Tensor) -> tuple[int, ...]:
    """The tensor's own strides if its elements lie side by side, else those of a contiguous one."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if reach == tensor.numel():
        return tensor.stride()
    return torch.empty(tensor.shape, device="meta").stride()
