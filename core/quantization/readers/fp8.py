"""FP8 weights with scales for blocks, as DeepSeek's and Qwen's, for rows (FBGEMM), or for the tensor.

`weight` float8_e4m3fn `[n, k]`; `weight_scale_inv` `[n / 128, k / 128]` or `weight_scale`, by which it is multiplied.
Activations are not rounded to FP8 here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from core.errors import CheckpointError, UnsupportedModelError
from core.quantization.form import WeightForm
from core.quantization.reader import Role, Stored
from core.quantization.readers.packed_integers import is_listed, scale_dtype
from core.quantization.weight import QuantizedWeight

EIGHT_BITS = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_SCALES = ("weight_scale_inv", "weight_scale")
_BESIDE = ("input_scale", "input_scale_ub", "activation_scale")
"""What activations would be rounded with."""


class Fp8Reader:
    """The reader of a checkpoint with FP8 weights."""

    def __init__(self, settings: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
        block = settings.get("weight_block_size")
        if block is not None and not (
            isinstance(block, list) and len(block) == 2 and all(isinstance(each, int) and each > 0 for each in block)
        ):
            raise CheckpointError(f"config.json: weight_block_size is {block!r}, but must be two sizes.", param="model")
        self._block: list[int] | None = block
        self._by_rows = settings.get("quant_method") == "fbgemm_fp8"
        self._kept = settings.get("modules_to_not_convert") or settings.get("ignored_layers")
        self._stored = stored
        self.names = fp8_modules(stored)
        where = f"blocks of {block[0]} x {block[1]}" if block else "rows" if self._by_rows else "tensors"
        self.title = f"FP8, scales for {where}"

    def form(self, name: str, n: int, k: int, role: Role) -> WeightForm | None:
        if self._stored:
            return fp8_form(name, n, k, self._stored, self._block) if name in self.names else None
        if role != "linear" or is_listed(name, self._kept):
            return None
        rows, group = self._block if self._block else (1, 0) if self._by_rows else (0, 0)
        return WeightForm(8, group, "float32", rows, fp8="float8_e4m3fn")

    def parts(self, name: str) -> tuple[str, ...]:
        return tuple(f"{name}.{part}" for part in ("weight", *_SCALES, *_BESIDE))

    def read(self, form: WeightForm, n: int, k: int, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        return fp8_weight(form, n, k, tensors)


def fp8_modules(stored: Mapping[str, Stored]) -> frozenset[str]:
    """Modules whose weights are FP8."""
    return frozenset(
        name.removesuffix(".weight")
        for name, tensor in stored.items()
        if name.endswith(".weight") and tensor.get_dtype() in EIGHT_BITS
    )


def fp8_form(name: str, n: int, k: int, stored: Mapping[str, Stored], block: list[int] | None) -> WeightForm:
    """By the shape of the scales in the files."""
    place = next((f"{name}.{part}" for part in _SCALES if f"{name}.{part}" in stored), None)
    if place is None:
        raise CheckpointError(f"{name}.weight is FP8, and has no {' or '.join(_SCALES)}.", param="model")
    shape, dtype = stored[place].get_shape(), scale_dtype(stored[place], "float32")
    kind = EIGHT_BITS[stored[f"{name}.weight"].get_dtype()]
    if math.prod(shape) == 1:
        return WeightForm(8, 0, dtype, 0, fp8=kind)
    if shape in ([n], [n, 1]):
        return WeightForm(8, 0, dtype, 1, fp8=kind)
    for rows, group in ([block] if block else []) + [[1, -(-k // shape[1])]] * (len(shape) == 2 and shape[0] == n):
        form = WeightForm(8, group, dtype, rows, fp8=kind)
        if list(form.groups(n, k)) == shape:
            return form
    raise UnsupportedModelError(
        f"{place} has the shape {shape}, which is not known of a weight {n} x {k}.", param="model"
    )


def fp8_weight(form: WeightForm, n: int, k: int, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
    """The bytes as they are, and the scales."""
    scale = next(tensors[part] for part in _SCALES if part in tensors)
    codes = tensors["weight"].contiguous().view(torch.uint8)
    return QuantizedWeight(form, n, k, codes, scale.reshape(form.groups(n, k)).contiguous())
