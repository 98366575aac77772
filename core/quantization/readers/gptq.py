"""GPTQ: integers packed along the inputs, `w = scale * (q - zero)`; columns may be grouped in any order (act-order).

Layout as of AutoGPTQ and GPTQModel: `qweight` int32 `[k * bits / 32, n]`, `qzeros` int32 `[groups, n * bits / 32]`,
`scales` `[groups, n]`, `g_idx` int32 `[k]`. The first version of the format (`gptq`) keeps each zero less one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from core.errors import CheckpointError, UnsupportedModelError
from core.quantization.form import WeightForm
from core.quantization.reader import Role, Stored
from core.quantization.readers.packed_integers import (
    in_groups,
    modules_with,
    order_of,
    scale_dtype,
    unpack_words,
    whole,
)
from core.quantization.weight import QuantizedWeight, pack

_BITS = (2, 3, 4, 8)
_FORMATS = {"gptq": 1, "gptq_v2": 0}
"""What is missing in each zero."""


class GptqReader:
    """The reader of a GPTQ checkpoint."""

    def __init__(self, settings: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
        self._bits, self._group = whole(settings, "bits"), whole(settings, "group_size")
        kept = str(settings.get("checkpoint_format") or "gptq")
        if kept not in _FORMATS:
            raise UnsupportedModelError(f"GPTQ checkpoints of the format {kept!r} are not supported.", param="model")
        if self._bits not in _BITS:
            raise UnsupportedModelError(f"GPTQ with {self._bits} bits is not supported.", param="model")
        self._less = _FORMATS[kept]
        self._ordered = bool(settings.get("desc_act", False))
        self._stored = stored
        self._has_head = bool(settings.get("lm_head", False))
        self.names = modules_with(stored, "qweight")
        size = f"groups of {self._group}" if self._group > 0 else "a group for each row"
        self.title = f"GPTQ, {self._bits} bits, {size}{', act-order' if self._ordered else ''}"

    def form(self, name: str, n: int, k: int, role: Role) -> WeightForm | None:
        if self._stored:
            if name not in self.names:
                return None
            packed = self._stored[f"{name}.qweight"].get_shape()
            if packed != [k * self._bits // 32, n]:
                raise CheckpointError(
                    f"{name}.qweight has the shape {packed}, which is not that of {n} x {k} in {self._bits} bits.",
                    param="model",
                )
        elif role == "embedding" or (role == "head" and not self._has_head):
            return None
        dtype = scale_dtype(self._stored.get(f"{name}.scales"), "float16")
        return WeightForm(self._bits, self._columns(k), dtype, zero="uint8", ordered=self._ordered)

    def _columns(self, k: int) -> int:
        return self._group if 0 < self._group < k else 0

    def parts(self, name: str) -> tuple[str, ...]:
        return tuple(f"{name}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx"))

    def read(self, form: WeightForm, n: int, k: int, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        codes = unpack_words(tensors["qweight"].t(), self._bits, k)
        top = (1 << self._bits) - 1
        zero = (unpack_words(tensors["qzeros"], self._bits, n) + self._less) & top
        order, groups = None, tensors.get("g_idx")
        if form.ordered:
            if groups is None:
                raise CheckpointError("it has no g_idx, though its columns are in act-order.", param="model")
            order = order_of(groups, form.group or k)
            codes = codes[:, order.long()]
        elif groups is not None and not in_groups(groups, form.group or k):
            raise CheckpointError("its columns are in act-order (g_idx), which config.json denies.", param="model")
        scale = tensors["scales"].t().contiguous()
        return QuantizedWeight(form, n, k, pack(codes, self._bits), scale, zero.t().contiguous(), order=order)
