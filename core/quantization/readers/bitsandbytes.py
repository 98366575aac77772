"""bitsandbytes: nf4 in blocks of a weight's numbers, and int8 with a scale for each row.

nf4: `weight` uint8 `[n * k / 2, 1]`, the first of two numbers in the high bits; `weight.absmax` float32, or its codes
with `weight.nested_absmax`, `weight.nested_quant_map` and an offset; `weight.quant_state.bitsandbytes__nf4` is JSON.
int8: `weight` int8 `[n, k]`, `SCB` float32 `[n]`, `w = q * SCB / 127`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from core.errors import CheckpointError, UnsupportedModelError
from core.quantization.form import WeightForm
from core.quantization.reader import Role, Stored
from core.quantization.readers.packed_integers import is_listed, modules_with
from core.quantization.weight import QuantizedWeight, codebook, pack

_BLOCK = 64
_STATE = "bitsandbytes__nf4"
_OF_NF4 = (
    "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
    f"weight.quant_state.{_STATE}",
)  # fmt: skip
_OF_INT8 = ("weight", "SCB", "weight_format")


class BitsAndBytesReader:
    """The reader of a bitsandbytes checkpoint."""

    def __init__(self, settings: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
        self._is_int8 = bool(settings.get("load_in_8bit"))
        kind = str(settings.get("bnb_4bit_quant_type", "fp4"))
        if not self._is_int8 and kind != "nf4":
            raise UnsupportedModelError(f"bitsandbytes' {kind} is not supported; nf4 and int8 are.", param="model")
        self._kept = settings.get("llm_int8_skip_modules")
        self._stored = stored
        self.names = modules_with(stored, "SCB" if self._is_int8 else f"weight.quant_state.{_STATE}")
        self.title = "bitsandbytes int8" if self._is_int8 else "bitsandbytes nf4"

    def form(self, name: str, n: int, k: int, role: Role) -> WeightForm | None:
        if name not in self.names if self._stored else role != "linear" or is_listed(name, self._kept):
            return None
        if self._is_int8:
            return WeightForm(8, 0, "float32", offset=128)
        if k % _BLOCK:
            raise UnsupportedModelError(
                f"{name}: blocks of nf4 that begin within a row are not supported.", param="model"
            )
        return WeightForm(4, _BLOCK, "float32", codebook="nf4")

    def parts(self, name: str) -> tuple[str, ...]:
        return tuple(f"{name}.{part}" for part in (_OF_INT8 if self._is_int8 else _OF_NF4))

    def read(self, form: WeightForm, n: int, k: int, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        if self._is_int8:
            if tensors.get("weight_format", torch.zeros(())).any():
                raise CheckpointError("its int8 weight is in the layout of a GPU.", param="model")
            scale = (tensors["SCB"].float() / 127).reshape(n, 1)
            return QuantizedWeight(form, n, k, tensors["weight"].view(torch.uint8) ^ 0x80, scale)
        state = _state(tensors[_STATE])
        if state.get("blocksize") != form.group or list(state.get("shape", ())) != [n, k]:
            raise CheckpointError(
                f"its quant_state has other blocks than {form.group}, or another shape.", param="model"
            )
        if not torch.equal(tensors["quant_map"].float(), codebook("nf4", torch.device("cpu"))):
            raise CheckpointError("its quant_map is not that of nf4.", param="model")
        both = tensors["weight"].flatten().view(torch.uint8)
        codes = torch.stack((both >> 4, both & 15), dim=1).view(n, k)
        return QuantizedWeight(form, n, k, pack(codes, 4), _absmax(state, tensors).reshape(form.groups(n, k)))


def _state(raw: torch.Tensor) -> dict[str, Any]:
    try:
        state = json.loads(bytes(raw.tolist()))
    except ValueError as error:
        raise CheckpointError("its quant_state is not JSON.", param="model") from error
    if not isinstance(state, dict):
        raise CheckpointError("its quant_state is not an object.", param="model")
    return state


def _absmax(state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Of each block; where they are quantized themselves, as bitsandbytes dequantizes them."""
    absmax = tensors["absmax"].flatten()
    nested = tensors.get("nested_absmax")
    if nested is None:
        return absmax.float()
    size, offset = state.get("nested_blocksize", 256), state.get("nested_offset", 0.0)
    if not isinstance(size, int) or size <= 0 or not isinstance(offset, (int, float)):
        raise CheckpointError("its quant_state has no nested_blocksize or nested_offset.", param="model")
    values = tensors["nested_quant_map"].float()[absmax.long()]
    return values * nested.float().repeat_interleave(size)[: len(values)] + offset
