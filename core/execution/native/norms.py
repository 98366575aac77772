"""RMS norms of a model handed over to the kernels."""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from core.execution.native.dtypes import DTYPES
from core.execution.native.kernels import NativeKernels
from core.execution.native.recognize import same_forward


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
