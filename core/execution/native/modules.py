"""Linear layers of a model handed over to the kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from core.execution.native.kernels import NativeKernels, PreparedLinear


class NativeLinear(nn.Linear):
    """An `nn.Linear` whose inference runs in a native kernel. The parameters stay the same objects."""

    def __init__(self, linear: nn.Linear, kernels: NativeKernels) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.train(linear.training)
        self.kernels = kernels
        self._prepared: PreparedLinear | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` `[..., in_features]` to `[..., out_features]`. With gradients on, torch's own."""
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        assert weight is not None
        if torch.is_grad_enabled():
            return F.linear(x, weight, bias)
        prepared = self._prepared
        if prepared is None or prepared.weight_address != weight.data_ptr() or prepared.bias is not bias:
            if not PreparedLinear.covers(weight, bias):
                return F.linear(x, weight, bias)
            prepared = self._prepared = PreparedLinear(self.kernels, weight, bias)
        return prepared(x)


def swap_linears(model: nn.Module, kernels: NativeKernels) -> int:
    """Replace every plain `nn.Linear` inside `model` whose weight the kernels cover. Returns how many there were.

    A module that is used in several places (tied layers) stays one module.
    """
    replaced: dict[nn.Module, NativeLinear] = {}
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if type(child) is nn.Linear and PreparedLinear.covers(child.weight, child.bias):
                if child not in replaced:
                    replaced[child] = NativeLinear(child, kernels)
                    count += 1
                setattr(parent, name, replaced[child])
    return count
