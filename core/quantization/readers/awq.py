"""AWQ: 4-bit integers packed along the outputs, eight in a word in an order of their own, `w = scale * (q - zero)`.

Layout as of AutoAWQ's GEMM version: `qweight` int32 `[k, n / 8]`, `qzeros` int32 `[groups, n / 8]`, `scales`
`[groups, n]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from core.errors import CheckpointError, UnsupportedModelError
from core.quantization.form import WeightForm
from core.quantization.reader import Role, Stored
from core.quantization.readers.packed_integers import is_listed, modules_with, scale_dtype, unpack_words, whole
from core.quantization.weight import QuantizedWeight, pack

_BITS = 4
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in its word each of eight neighbours is."""


class AwqReader:
    """The reader of an AWQ checkpoint."""

    def __init__(self, settings: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
        bits = whole(settings, "bits", settings.get("w_bit"))
        version = str(settings.get("version", "gemm")).lower()
        if bits != _BITS or version != "gemm":
            raise UnsupportedModelError(
                f"AWQ with {bits} bits in the {version} layout is not supported.", param="model"
            )
        self._group = whole(settings, "group_size", settings.get("q_group_size"))
        self._has_zero = bool(settings.get("zero_point", True))
        self._kept = settings.get("modules_to_not_convert")
        self._stored = stored
        self.names = modules_with(stored, "qweight")
        self.title = f"AWQ, 4 bits, groups of {self._group}"

    def form(self, name: str, n: int, k: int, role: Role) -> WeightForm | None:
        if self._stored:
            if name not in self.names:
                return None
            packed = self._stored[f"{name}.qweight"].get_shape()
            if packed != [k, n // 8]:
                raise CheckpointError(
                    f"{name}.qweight has the shape {packed}, which is not that of {n} x {k} in 4 bits.", param="model"
                )
        elif role != "linear" or is_listed(name, self._kept):
            return None
        dtype = scale_dtype(self._stored.get(f"{name}.scales"), "float16")
        return WeightForm(_BITS, self._group if 0 < self._group < k else 0, dtype, zero="uint8")

    def parts(self, name: str) -> tuple[str, ...]:
        return tuple(f"{name}.{part}" for part in ("qweight", "qzeros", "scales"))

    def read(self, form: WeightForm, n: int, k: int, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        codes, scale = _in_order(tensors["qweight"], n), tensors["scales"].t().contiguous()
        zero = _in_order(tensors["qzeros"], n) if self._has_zero else torch.full(scale.t().shape, 8, dtype=torch.uint8)
        return QuantizedWeight(form, n, k, pack(codes.t().contiguous(), _BITS), scale, zero.t().contiguous())


def _in_order(words: torch.Tensor, count: int) -> torch.Tensor:
    numbers = unpack_words(words, _BITS, count)
    return numbers.reshape(len(numbers), -1, 8)[..., list(_PLACES)].flatten(1)
