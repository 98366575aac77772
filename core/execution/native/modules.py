"""Linear layers and RMS norms of a model handed over to the kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from core.execution.native.kernels import NativeKernels, PreparedLinear
from core.execution.native.recognize import same_forward
from core.execution.native.structs import DTYPES


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
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if type(child) is nn.Linear and PreparedLinear.covers(child.weight, child.bias):
                if child not in replaced:
                    replaced[child] = NativeLinear(child, kernels)
                setattr(parent, name, replaced[child])
    return len(replaced)


class NativeRMSNorm(nn.Module):
    """Llama's RMS norm in one kernel. The parameter stays the same object, under the same name."""

    def __init__(self, norm: nn.Module, kernels: NativeKernels) -> None:
        super().__init__()
        self.weight: nn.Parameter = norm.weight  # type: ignore[assignment]
        self.variance_epsilon = float(norm.variance_epsilon)  # type: ignore[arg-type]
        self.train(norm.training)
        self.kernels = kernels

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`hidden_states` `[..., hidden_size]`, normalised over the last dimension."""
        return self.kernels.rms_norm(hidden_states, self.weight, self.variance_epsilon)


def is_llama_norm(module: nn.Module) -> bool:
    """Whether the module computes what Llama's RMS norm does: most architectures have their own copy."""
    return isinstance(module, NativeRMSNorm) or (
        hasattr(module, "variance_epsilon") and same_forward(module, LlamaRMSNorm)
    )


def swap_norms(model: nn.Module, kernels: NativeKernels) -> int:
    """Replace every CPU RMS norm of Llama's kind inside `model`. Returns how many there were."""
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            weight = getattr(child, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.is_cpu and weight.dtype in DTYPES and is_llama_norm(child):
                setattr(parent, name, NativeRMSNorm(child, kernels))
                count += 1
    return count


def shared_tensors(model: nn.Module) -> set[torch.Tensor]:
    """Parameters and buffers whose memory overlaps that of another module's."""
    held = (item for each in model.modules() for item in (*each._parameters.values(), *each._buffers.values()))
    tensors = sorted((t for t in held if t is not None and t.is_cpu), key=lambda t: t.data_ptr())
    shared: set[torch.Tensor] = set()
    end, last = 0, None
    for tensor in tensors:
        if last is not None and tensor.data_ptr() < end:
            shared.update((last, tensor))
        stop = tensor.data_ptr() + tensor.nbytes
        if stop >= end:
            end, last = stop, tensor
    return shared
