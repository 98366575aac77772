"""Products with quantized weights by the CPU kernels: from panels, or by rows that become numbers just before they are
multiplied."""

from __future__ import annotations

from ctypes import addressof
from dataclasses import fields, replace
from typing import Any

import torch

from core.execution.native.kernels import NativeKernels
from core.execution.native.modules import shared_tensors
from core.execution.native.structs import DTYPES, Quantized, Weights
from core.quantization.form import SUPER_GROUP, WeightForm
from core.quantization.linear import QuantLinear
from core.quantization.weight import QuantizedWeight, codebook

_BYTE_NUMBERS = torch.arange(256, dtype=torch.int32).to(torch.uint8)


def _meanings(form: WeightForm) -> torch.Tensor | None:
    """fp32, what each code means, where that is not itself."""
    if form.fp8 is not None:
        return _BYTE_NUMBERS.view(getattr(torch, form.fp8)).float()
    return None if form.codebook is None else codebook(form.codebook, torch.device("cpu"))


def covers(form: WeightForm, k: int) -> bool:
    """Whether the kernels compute with weights of `k` columns in this form: codes that are not whole bytes begin a byte
    where a group begins, and super scales where another one does."""
    whole = form.bits == 8 or (form.group % 8 == 0 and k % 8 == 0)
    return whole and (form.supers is None or (form.group > 0 and SUPER_GROUP % form.group == 0))


_PANEL, _BLOCK, _MOST_SPAN = 16, 32, 128
"""Rows of a panel, columns that a word of every plane is part of, and the most columns of x that share a power of two:
as in `panels.c`."""

_WHOLE_CODEBOOKS = ("iq4_nl",)


def covers_panels(form: WeightForm, n: int, k: int) -> bool:
    """Whether a weight `[n, k]` in this form can be arranged in panels: its values are whole numbers, and its groups
    end where those of x do."""
    whole = form.fp8 is None and (form.codebook is None or form.codebook in _WHOLE_CODEBOOKS)
    group = 0 if form.group >= k else form.group
    spans = group in (0, 16, 32, 64) or group % _MOST_SPAN == 0
    rows = form.rows in (0, 1) or form.rows % _PANEL == 0
    return whole and spans and rows and n % _PANEL == 0 and k % _BLOCK == 0 and covers(form, k)


class NativeProduct:
    """A quantized weight with what the kernels have to know of it, for as long as its tensors stay where they are."""

    def __init__(
        self, kernels: NativeKernels, weight: QuantizedWeight, bias: torch.Tensor | None, *, panels: bool = False
    ) -> None:
        self._kernels, self._weight, self._bias = kernels, weight, bias
        self._meanings = _meanings(weight.form)
        self._view = Quantized.of(weight, self._meanings, panels=panels)
        self._facts: dict[torch.dtype, Weights] = {}

    def facts(self, dtype: torch.dtype) -> Weights | None:
        """For products with `x` of this dtype whose columns are those of the codes; None where there are none."""
        bias = self._bias
        if self._weight.order is not None or dtype not in DTYPES or (bias is not None and bias.dtype is not dtype):
            return None
        return self._facts_of(dtype)

    def _facts_of(self, dtype: torch.dtype) -> Weights:
        found = self._facts.get(dtype)
        if found is None:
            bias = 0 if self._bias is None else self._bias.data_ptr()
            shape = self._weight.n, self._weight.k
            found = self._facts[dtype] = Weights(DTYPES[dtype], *shape, shape[1], 0, bias, 0, addressof(self._view))
        return found

    def __call__(self, x: torch.Tensor) -> torch.Tensor | None:
        """`[..., k]` to `[..., n]`; None for a dtype that the kernels do not have."""
        weight, bias = self._weight, self._bias
        if not x.is_cpu or x.dtype not in DTYPES or (bias is not None and bias.dtype is not x.dtype):
            return None
        if not x.numel():
            return x.new_empty((*x.shape[:-1], weight.n))
        if weight.order is not None:
            x = x.index_select(-1, weight.order)
        return self._kernels.linear(self._facts_of(x.dtype), x)


class NativeProducts:
    """The kernels as `core.quantization.kernels.ProductKernel`: weights stay as they are."""

    name = "native"

    def __init__(self, kernels: NativeKernels) -> None:
        self.kernels = kernels

    def arrange(self, weight: QuantizedWeight, *, may_change: bool) -> bool:
        return covers(weight.form, weight.k) and weight.codes.is_cpu

    def restored(self, weight: QuantizedWeight) -> QuantizedWeight:
        return weight

    def prepare(self, weight: QuantizedWeight, bias: torch.Tensor | None) -> NativeProduct:
        return NativeProduct(self.kernels, weight, bias)


class PanelProducts:
    """The kernels as `core.quantization.kernels.ProductKernel`: weights are arranged in panels, where they are."""

    name = "panels"

    def __init__(self, kernels: NativeKernels) -> None:
        self.kernels = kernels

    def arrange(self, weight: QuantizedWeight, *, may_change: bool) -> bool:
        covered = self.kernels.has_panels and covers_panels(weight.form, weight.n, weight.k)
        tensors = _tensors(weight).values()
        if not (covered and may_change and all(each.is_cpu and each.is_contiguous() for each in tensors)):
            return False
        self.kernels.arrange(Quantized.of(weight, None), weight.n)
        return True

    def restored(self, weight: QuantizedWeight) -> QuantizedWeight:
        copy = replace(weight, **{name: tensor.clone() for name, tensor in _tensors(weight).items()})
        self.kernels.arrange(Quantized.of(copy, None), copy.n, back=True)
        return copy

    def prepare(self, weight: QuantizedWeight, bias: torch.Tensor | None) -> NativeProduct:
        return NativeProduct(self.kernels, weight, bias, panels=True)


def _tensors(weight: QuantizedWeight) -> dict[str, Any]:
    values = {field.name: getattr(weight, field.name) for field in fields(weight)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def use_kernels(model: torch.nn.Module, kernels: NativeKernels) -> int:
    """Let every quantized linear layer in `model` compute with the kernels, from panels where that is possible and
    nobody else reads its tensors. Returns how many do."""
    panels, products = PanelProducts(kernels), NativeProducts(kernels)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    shared = shared_tensors(model)
    done = 0
    for layer in layers:
        alone = shared.isdisjoint(layer.buffers())
        done += layer.use(panels, may_change=alone) or layer.use(products)
    return done


def quantized_facts(layer: QuantLinear) -> Weights | None:
    """What the kernels have to know of a layer; None if they do not compute it as it is."""
    product = layer.prepared
    return product.facts(layer.dtype) if isinstance(product, NativeProduct) else None
