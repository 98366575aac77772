"""Weights of linear layers rearranged for integer multiplications; the format is described in `packed.c`."""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn

from core.execution.native.kernels import NativeKernels, PreparedLinear
from core.execution.native.modules import NativeLinear, shared_tensors
from core.execution.native.quantized import quantized_facts
from core.execution.native.structs import Weights
from core.quantization.linear import QuantLinear

GROUP = 128
"""Elements of a row that share an exponent, as in `packed.c`."""

_PANEL = 16
_MOST = 2.0**107


def exponent_bytes(n: int, k: int) -> int:
    """What a packed bf16 weight `[n, k]` takes beyond the weight itself; 0 if its shape is not packed."""
    if n % _PANEL or k % _PANEL:
        return 0
    return n * -(-k // GROUP)


def packing_bytes(model: nn.Module) -> int:
    """At most what packing the linear layers of `model`, which may be on `meta`, takes beyond their weights."""
    users = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    return sum(
        exponent_bytes(*module.weight.shape)
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.weight.dtype is torch.bfloat16 and users[id(module.weight)] == 1
    )


class PackedLinear(nn.Module):
    """A bf16 linear layer without a weight of its own: `panels`, in the weight's memory, and `exponents`."""

    def __init__(self, linear: NativeLinear, exponents: torch.Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        self.dtype = weight.dtype
        self.panels: torch.Tensor
        self.exponents: torch.Tensor
        self.register_buffer("panels", weight.view(torch.int16), persistent=False)
        self.register_buffer("exponents", exponents, persistent=False)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", linear.bias)
        self.train(linear.training)
        self._kernels = linear.kernels
        self.tensors_moved()

    def tensors_moved(self) -> None:
        """Panels and exponents have other memory now."""
        self._prepared = PreparedLinear(self._kernels, self.panels.view(self.dtype), self.bias, self.exponents)

    @property
    def weight(self) -> torch.Tensor:
        """`[out_features, in_features]` in bf16, computed when asked for."""
        n, k = self.panels.shape
        pairs = self.panels.view(n // _PANEL, k // 2, _PANEL, 2)
        powers = torch.exp2(self.exponents.view(n // _PANEL, -1, _PANEL).float() - 127)
        values = pairs.float() * powers.repeat_interleave(GROUP // 2, 1)[:, : k // 2, :, None]
        return values.permute(0, 2, 1, 3).reshape(n, k).to(self.dtype)

    @property
    def facts(self) -> Weights:
        """What the kernels have to know; valid as long as this module."""
        return self._prepared.facts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` `[..., in_features]` to `[..., out_features]`. For inference: there are no gradients."""
        if x.dtype is self.dtype and x.is_cpu and x.shape[-1] == self.in_features and x.numel():
            return self._prepared.run(x)
        return F.linear(x, self.weight, self.bias)


def linear_facts(module: object) -> Weights | None:
    """What the kernels have to know of a linear layer; None if it is not one that they cover."""
    if isinstance(module, PackedLinear):
        return module.facts
    if isinstance(module, QuantLinear):
        return quantized_facts(module)
    if isinstance(module, nn.Linear) and PreparedLinear.covers(module.weight, module.bias):
        return Weights.of(module.weight, module.bias)
    return None


def pack_linears(model: nn.Module, kernels: NativeKernels) -> int:
    """Pack the weight of every bf16 `NativeLinear` where it is, and replace the module. Returns how many there were.

    Left alone: weights that others read too (tied embeddings), of a shape that `exponent_bytes` does not know, of
    values beyond the format's range or not finite. A module in several places stays one module.
    """
    if not kernels.packs:
        return 0
    shared = shared_tensors(model)
    replaced: dict[nn.Module, PackedLinear] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if not isinstance(child, NativeLinear):
                continue
            if child not in replaced and child.weight not in shared and _can_pack(child.weight):
                exponents = kernels.pack(child.weight.detach())
                replaced[child] = PackedLinear(child, exponents)
            if child in replaced:
                setattr(parent, name, replaced[child])
    return len(replaced)


def _can_pack(weight: torch.Tensor) -> bool:
    if weight.dtype is not torch.bfloat16 or not weight.is_contiguous() or not exponent_bytes(*weight.shape):
        return False
    low, high = weight.detach().aminmax()  # NaN if there is one
    return -_MOST < float(low) <= float(high) < _MOST
