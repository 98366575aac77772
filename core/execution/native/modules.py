"""Linear layers and RMS norms of a model handed over to the kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from core.execution.native.kernels import DTYPES, NativeKernels, PreparedLinear


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


class NativeRMSNorm(nn.Module):
    """A model's RMS norm, run in a native kernel. `weight` stays the same parameter.

    Args:
        norm: the module it stands for; its own forward runs where the kernel cannot.
        offset, cast_first: what `NativeKernels.rms_norm` says of them.
    """

    def __init__(self, norm: nn.Module, kernels: NativeKernels, eps: float, offset: float, cast_first: bool) -> None:
        super().__init__()
        self.register_parameter("weight", _weight(norm))
        self.variance_epsilon = self.eps = eps
        self.train(norm.training)
        self._kernels, self._offset, self._cast_first = kernels, offset, cast_first
        self._original = (norm,)  # in a tuple: not a submodule, so that names in the state dict stay

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` `[..., K]` to the same shape."""
        weight = self._parameters["weight"]
        assert weight is not None
        if torch.is_grad_enabled() or x.dtype is not weight.dtype or x.dtype not in DTYPES or not x.is_cpu:
            self._original[0].weight = weight
            result: torch.Tensor = self._original[0](x)
            return result
        return self._kernels.rms_norm(x, weight, self.eps, offset=self._offset, cast_first=self._cast_first)


def _weight(norm: nn.Module) -> nn.Parameter:
    weight: nn.Parameter = norm.get_parameter("weight")
    return weight


def _rms_variant(norm: nn.Module, eps: float) -> tuple[float, bool] | None:
    """The (offset, cast_first) with which the kernel computes what `norm` does, found by trying; None: neither fits.

    Models of one family differ in where they round and in what they add to the weight, and the class names do not tell.
    """
    generator = torch.Generator().manual_seed(0)
    size = len(_weight(norm))
    x = torch.randn(4, size, generator=generator).bfloat16()
    weight = torch.randn(size, generator=generator).bfloat16()
    wide = x.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    answers = {
        (0.0, True): weight * normal.bfloat16(),
        (0.0, False): (normal * weight.float()).bfloat16(),
        (1.0, False): (normal * (1.0 + weight.float())).bfloat16(),
    }
    with torch.inference_mode():
        try:
            given = torch.func.functional_call(norm, {"weight": weight}, (x,))
        except (RuntimeError, TypeError):
            return None
    fitting = [variant for variant, answer in answers.items() if torch.equal(given, answer)]
    return fitting[0] if len(fitting) == 1 else None


def swap_norms(model: nn.Module, kernels: NativeKernels) -> int:
    """Replace every RMS norm inside `model` that the kernel computes alike by a `NativeRMSNorm`. Returns how many."""
    known: dict[tuple[type[nn.Module], float, int], tuple[float, bool] | None] = {}
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is None or not type(child).__name__.endswith("RMSNorm") or isinstance(child, NativeRMSNorm):
                continue
            eps = getattr(child, "variance_epsilon", getattr(child, "eps", None))
            names = [name for name, _ in child.named_parameters()]
            if not isinstance(eps, float) or names != ["weight"] or not _covers_norm(_weight(child)):
                continue
            key = (type(child), eps, len(_weight(child)))
            if key not in known:
                known[key] = _rms_variant(child, eps)
            if (variant := known[key]) is not None:
                setattr(parent, name, NativeRMSNorm(child, kernels, eps, *variant))
                count += 1
    return count


def _covers_norm(weight: torch.Tensor) -> bool:
    return weight.dim() == 1 and weight.is_cpu and weight.dtype in DTYPES and weight.is_contiguous()
