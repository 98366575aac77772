"""Linear layers of a model handed over to the kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from core.execution.native.kernels import DTYPES, NativeKernels


class NativeLinear(nn.Linear):
    """An `nn.Linear` whose inference runs in a native kernel. The parameters stay the same objects."""

    def __init__(self, linear: nn.Linear, kernels: NativeKernels) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.train(linear.training)
        self.kernels = kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` `[..., in_features]` to `[..., out_features]`. With gradients on, torch's own."""
        if torch.is_grad_enabled():
            return F.linear(x, self.weight, self.bias)
        return self.kernels.linear(x, self.weight, self.bias)


def swap_linears(model: nn.Module, kernels: NativeKernels) -> int:
    """Replace every plain CPU `nn.Linear` inside `model` by a `NativeLinear`. Returns how many there were."""
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.is_cpu and child.weight.dtype in DTYPES:
                setattr(parent, name, NativeLinear(child, kernels))
                count += 1
    return count
