"""compressed-tensors: int4 and int8 packed in words, int8 as it is, and FP8.

`pack-quantized`: `weight_packed` int32 `[n, k * bits / 32]` with numbers moved up by half their range, `weight_scale`
`[n, groups]`, `weight_zero_point` int32 `[n * bits / 32, groups]` packed along the rows, `weight_g_idx` int32 `[k]`.
`int-quantized`: `weight` int8 `[n, k]`; `float-quantized`: `weight` float8. Activations are not rounded here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from core.errors import CheckpointError, UnsupportedModelError
from core.quantization.form import WeightForm
from core.quantization.reader import Role, Stored
from core.quantization.readers.fp8 import fp8_form, fp8_modules, fp8_weight
from core.quantization.readers.packed_integers import (
    in_groups,
    modules_with,
    order_of,
    scale_dtype,
    unpack_words,
    whole,
)
from core.quantization.weight import QuantizedWeight, pack

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_STRATEGIES = ("tensor", "channel", "group", "block")
_PARTS = (
    "weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape", "input_scale",
    "input_zero_point", "output_scale", "k_scale", "v_scale", "q_scale",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Scheme:
    bits: int
    is_float: bool
    symmetric: bool
    group: int
    block: list[int] | None
    ordered: bool
    targets: tuple[str, ...]


class CompressedTensorsReader:
    """The reader of a compressed-tensors checkpoint."""

    def __init__(self, settings: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
        self._format = str(settings.get("format", ""))
        groups = settings.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise CheckpointError("config.json: config_groups of quantization_config must name schemes.", param="model")
        formats = {str(group.get("format") or self._format) for group in groups.values() if isinstance(group, dict)}
        unknown = sorted(formats - set(_FORMATS))
        if unknown or settings.get("sparsity_config"):
            what = f"the format {unknown[0]!r}" if unknown else "sparsity"
            raise UnsupportedModelError(f"compressed-tensors with {what} is not supported.", param="model")
        self._schemes = tuple(_scheme(group) for group in groups.values())
        self._ignored = tuple(each for each in settings.get("ignore") or () if isinstance(each, str))
        self._stored = stored
        self._packed, self._eight = modules_with(stored, "weight_packed"), fp8_modules(stored)
        whole_numbers = {
            name.removesuffix(".weight") for name, tensor in stored.items()
            if name.endswith(".weight") and tensor.get_dtype() == "I8"
        }  # fmt: skip
        self.names = self._packed | self._eight | whole_numbers
        kinds = {f"{'fp8' if scheme.is_float else f'int{scheme.bits}'}" for scheme in self._schemes}
        self.title = f"compressed-tensors, {', '.join(sorted(kinds))}"

    def form(self, name: str, n: int, k: int, role: Role) -> WeightForm | None:
        if name not in self.names if self._stored else role == "embedding" or self._is_ignored(name, role):
            return None
        scheme = self._scheme_of(name)
        scale = scale_dtype(self._stored.get(f"{name}.weight_scale"), "bfloat16")
        if scheme.is_float:
            if self._stored:
                return fp8_form(name, n, k, self._stored, scheme.block)
            return WeightForm(8, scheme.group, scale, 1, fp8="float8_e4m3fn")
        group = scheme.group if 0 < scheme.group < k else 0
        rows = 0 if self._stored and self._stored[f"{name}.weight_scale"].get_shape() in ([], [1]) else 1
        if scheme.symmetric:
            return WeightForm(scheme.bits, group, scale, rows, offset=1 << (scheme.bits - 1), ordered=scheme.ordered)
        return WeightForm(scheme.bits, group, scale, rows, zero="uint8", ordered=scheme.ordered)

    def _is_ignored(self, name: str, role: Role) -> bool:
        return role == "head" or any(_matches(name, pattern) for pattern in self._ignored)

    def _scheme_of(self, name: str) -> _Scheme:
        """The first whose targets are this module; a class's name is that of all linear layers."""
        for scheme in self._schemes:
            if any(_matches(name, target) for target in scheme.targets):
                return scheme
        return next((scheme for scheme in self._schemes if "Linear" in scheme.targets), self._schemes[0])

    def parts(self, name: str) -> tuple[str, ...]:
        return tuple(f"{name}.{part}" for part in _PARTS)

    def read(self, form: WeightForm, n: int, k: int, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        if form.fp8 is not None:
            return fp8_weight(form, n, k, tensors)
        half, points = 1 << (form.bits - 1), tensors.get("weight_zero_point")
        scale = tensors["weight_scale"].reshape(form.groups(n, k)).contiguous()
        if "weight_packed" in tensors:
            codes = unpack_words(tensors["weight_packed"], form.bits, k)
            if points is not None and points.dtype is torch.int32:
                points = unpack_words(points.t(), form.bits, n).t()
            elif points is not None:
                points = (points.int() + half).to(torch.uint8)
        else:
            codes = tensors["weight"].view(torch.uint8) ^ 0x80
            points = None if points is None else (points.int() + half).to(torch.uint8)
        if form.zero is not None and points is None:
            raise CheckpointError("it has no weight_zero_point, though it is asymmetric.", param="model")
        zero = points.reshape(form.groups(n, k)).contiguous() if form.zero is not None and points is not None else None
        order, groups = None, tensors.get("weight_g_idx")
        if form.ordered:
            if groups is None:
                groups = torch.arange(k) // (form.group or k)
            order = order_of(groups, form.group or k)
            codes = codes[:, order.long()]
        elif groups is not None and not in_groups(groups, form.group or k):
            raise CheckpointError("its columns are in act-order (weight_g_idx), which config.json denies.")
        return QuantizedWeight(form, n, k, pack(codes, form.bits), scale, zero, order=order)


def _scheme(group: Any) -> _Scheme:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise UnsupportedModelError("compressed-tensors without quantized weights is not supported.", param="model")
    bits, kind = whole(weights, "num_bits"), str(weights.get("type", "int"))
    strategy = str(weights.get("strategy") or ("group" if weights.get("group_size") else "tensor"))
    if (kind, bits) not in (("int", 4), ("int", 8), ("float", 8)) or strategy not in _STRATEGIES:
        raise UnsupportedModelError(
            f"compressed-tensors with {kind} weights of {bits} bits by {strategy} is not supported.", param="model"
        )
    size = weights.get("group_size") if strategy == "group" else None
    block = weights.get("block_structure")
    return _Scheme(
        bits, kind == "float", bool(weights.get("symmetric", True)), size if isinstance(size, int) and size > 0 else 0,
        block if isinstance(block, list) and len(block) == 2 else None, weights.get("actorder") in ("group", True),
        tuple(each for each in group.get("targets") or () if isinstance(each, str)),
    )  # fmt: skip


def _matches(name: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], name) is not None
        except re.error:
            return False
    return name == pattern or name.endswith(f".{pattern}")
