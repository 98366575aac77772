"""What a device's own kernel for quantized weights has to do; `core.quantization` describes what it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import torch

from core.quantization.weight import QuantizedWeight

Product: TypeAlias = Callable[[torch.Tensor], torch.Tensor | None]
"""`[..., k]` to `[..., n]` with the bias added, in the same dtype. None: not for this input (its dtype, strides, number
of rows); the reference then computes it."""


class ProductKernel(Protocol):
    """Computes products with quantized weights on one kind of device.

    `arrange` is called once for each weight, when it has been loaded; `prepare` after it, and again each time that the
    tensors have other addresses. A twin of a module over the same tensors is not arranged again, only prepared.
    """

    name: str

    def arrange(self, weight: QuantizedWeight, *, may_change: bool) -> bool:
        """Whether the kernel computes with weights like this one. If so, it may put the bytes of any of its tensors
        into an order of its own, in place; not where it not `may_change`: others read them too."""
        ...

    def restored(self, weight: QuantizedWeight) -> QuantizedWeight:
        """An arranged weight as `core.quantization` describes it, in new memory where `arrange` changed it."""
        ...

    def prepare(self, weight: QuantizedWeight, bias: torch.Tensor | None) -> Product:
        """What computes products with an arranged weight for as long as its tensors stay where they are."""
        ...
