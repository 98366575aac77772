"""HQQ: groups along the inputs, `w = (q - zero) * scale`, with zeros that are no whole numbers.

`W_q` uint8: the weight as `[n * k / group, group]`, of which the first half (4 bits) or quarter (2 bits) of the rows
are in the highest bits; `scale` and `zero` `[n * k / group, 1]`; beside them numbers that say how.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from core.errors import CheckpointError, UnsupportedModelError
from core.quantization.form import WeightForm
from core.quantization.reader import Role, Stored
from core.quantization.readers.packed_integers import is_listed, modules_with, scale_dtype
from core.quantization.weight import QuantizedWeight, pack

_BITS = (2, 4, 8)
_PARTS = (
    "W_q", "scale", "zero", "nbits", "group_size", "axis", "shape", "packing", "channel_wise", "optimize", "round_zero",
    "view_as_float", "unpack_view_dtype", "quant_scale", "quant_zero", "compute_dtype", "offload_meta",
    "encoded_state_dict", "stores_quant_config",
)  # fmt: skip


class HqqReader:
    """The reader of an HQQ checkpoint."""

    def __init__(self, settings: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
        given = settings.get("quant_config")
        params = given.get("weight_quant_params") if isinstance(given, dict) else None
        if not isinstance(params, dict):
            raise UnsupportedModelError("HQQ with other settings for each layer is not supported.", param="model")
        bits, group, axis = params.get("nbits"), params.get("group_size"), params.get("axis", 1)
        nested = params.get("quant_scale") or params.get("quant_zero")
        if not isinstance(bits, int) or bits not in _BITS or axis != 1 or nested or params.get("view_as_float"):
            raise UnsupportedModelError(
                f"HQQ with {bits} bits on axis {axis} is not supported; 2, 4 and 8 bits on axis 1 are, "
                "with scales and zeros that are not quantized.",
                param="model",
            )
        if not isinstance(group, int) or group <= 0:
            raise UnsupportedModelError(f"HQQ with groups of {group} is not supported.", param="model")
        self._bits, self._group = bits, group
        self._kept = settings.get("skip_modules")
        self._stored = stored
        self.names = modules_with(stored, "W_q")
        self.title = f"HQQ, {self._bits} bits, groups of {self._group}"

    def form(self, name: str, n: int, k: int, role: Role) -> WeightForm | None:
        if name not in self.names if self._stored else role != "linear" or is_listed(name, self._kept):
            return None
        if k % self._group:
            raise UnsupportedModelError(
                f"{name}: groups of HQQ that begin within a row are not supported.", param="model"
            )
        dtype = scale_dtype(self._stored.get(f"{name}.scale"), "float16")
        return WeightForm(self._bits, self._group, dtype, zero=scale_dtype(self._stored.get(f"{name}.zero"), dtype))

    def parts(self, name: str) -> tuple[str, ...]:
        return tuple(f"{name}.{part}" for part in _PARTS)

    def read(self, form: WeightForm, n: int, k: int, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        packed = tensors["W_q"].view(torch.uint8)
        top = (1 << form.bits) - 1
        parts = [(packed >> shift) & top for shift in range(8 - form.bits, -1, -form.bits)]
        codes = torch.cat(parts).flatten()
        if codes.numel() != n * k:
            raise CheckpointError(f"its W_q holds {codes.numel()} numbers of {n * k}.", param="model")
        shape = form.groups(n, k)
        return QuantizedWeight(
            form, n, k, pack(codes.view(n, k), form.bits), tensors["scale"].reshape(shape).contiguous(),
            zero=tensors["zero"].reshape(shape).contiguous(),
        )  # fmt: skip
