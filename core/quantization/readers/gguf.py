"""GGUF's blocks of quantized numbers, as ggml lays them out (ggml-quants.c), in the inner form.

A row of a tensor is a run of blocks of 32 or 256 columns, each with its own scales. Every number of a block is kept as
it is: blocks that have scales of scales keep both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from core.errors import CheckpointError, UnsupportedModelError
from core.quantization.form import WeightForm
from core.quantization.reader import Role, Stored
from core.quantization.weight import QuantizedWeight, pack

PLAIN = {"F32": 4, "F16": 2, "BF16": 2}
"""Types of tensors that are not quantized, and the bytes of a number."""

Fields = dict[str, torch.Tensor]


class BlockType(NamedTuple):
    """`columns` in `nbytes` bytes; `unpack` takes blocks `[n, B, nbytes]` to codes `[n, B, columns]` and scales of
    `[n, B, ...]`."""

    columns: int
    nbytes: int
    form: WeightForm
    unpack: Callable[[torch.Tensor], Fields]


def _half(raw: torch.Tensor) -> torch.Tensor:
    return raw.contiguous().view(torch.float16)


def _split(raw: torch.Tensor, *sizes: int) -> tuple[torch.Tensor, ...]:
    return torch.split(raw, list(sizes), dim=-1)


def _bits(raw: torch.Tensor, width: int, run: int) -> torch.Tensor:
    """Fields of `width` bits: of each `run` bytes first their lowest ones, then the next."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8)
    runs = raw.reshape(*raw.shape[:-1], -1, 1, run) >> shifts[:, None]
    return (runs & ((1 << width) - 1)).flatten(-3)


def _q4_0(raw: torch.Tensor) -> Fields:
    d, qs = _split(raw, 2, 16)
    return {"codes": _bits(qs, 4, 16), "scale": _half(d)}


def _q4_1(raw: torch.Tensor) -> Fields:
    d, m, qs = _split(raw, 2, 2, 16)
    return {"codes": _bits(qs, 4, 16), "scale": _half(d), "minimum": _half(m)}


def _fifth_bits(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Codes of 5 bits; of the fifth ones, a bit for each column in order."""
    return _bits(low, 4, 16) | (_bits(high, 1, 1) << 4)


def _q5_0(raw: torch.Tensor) -> Fields:
    d, high, qs = _split(raw, 2, 4, 16)
    return {"codes": _fifth_bits(qs, high), "scale": _half(d)}


def _q5_1(raw: torch.Tensor) -> Fields:
    d, m, high, qs = _split(raw, 2, 2, 4, 16)
    return {"codes": _fifth_bits(qs, high), "scale": _half(d), "minimum": _half(m)}


def _q8_0(raw: torch.Tensor) -> Fields:
    d, qs = _split(raw, 2, 32)
    return {"codes": qs ^ 0x80, "scale": _half(d)}


def _q2_k(raw: torch.Tensor) -> Fields:
    scales, qs, d, dmin = _split(raw, 16, 64, 2, 2)
    return {
        "codes": _bits(qs, 2, 32), "scale": scales & 15, "minimum": scales >> 4, "super_scale": _half(d),
        "super_minimum": -_half(dmin),
    }  # fmt: skip


def _q3_k(raw: torch.Tensor) -> Fields:
    high, qs, scales, d = _split(raw, 32, 64, 12, 2)
    low_scales, high_scales = _split(scales, 8, 4)
    numbers = _bits(low_scales, 4, 8) | (_bits(high_scales, 2, 4) << 4)
    return {
        "codes": _bits(qs, 2, 32) | (_bits(high, 1, 32) << 2), "scale": numbers.to(torch.int8) - 32,
        "super_scale": _half(d),
    }  # fmt: skip


def _k_scales(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight scales and eight minima of 6 bits in 12 bytes."""
    first, second, both = _split(raw, 4, 4, 4)
    scales = torch.cat((first & 63, (both & 15) | ((first >> 2) & 0x30)), dim=-1)
    return scales, torch.cat((second & 63, (both >> 4) | ((second >> 2) & 0x30)), dim=-1)


def _q4_k(raw: torch.Tensor) -> Fields:
    d, dmin, packed, qs = _split(raw, 2, 2, 12, 128)
    scale, minimum = _k_scales(packed)
    return {
        "codes": _bits(qs, 4, 32), "scale": scale, "minimum": minimum, "super_scale": _half(d),
        "super_minimum": -_half(dmin),
    }  # fmt: skip


def _q5_k(raw: torch.Tensor) -> Fields:
    d, dmin, packed, high, qs = _split(raw, 2, 2, 12, 32, 128)
    scale, minimum = _k_scales(packed)
    return {
        "codes": _bits(qs, 4, 32) | (_bits(high, 1, 32) << 4), "scale": scale, "minimum": minimum,
        "super_scale": _half(d), "super_minimum": -_half(dmin),
    }  # fmt: skip


def _q6_k(raw: torch.Tensor) -> Fields:
    low, high, scales, d = _split(raw, 128, 64, 16, 2)
    return {
        "codes": _bits(low, 4, 64) | (_bits(high, 2, 32) << 4), "scale": scales.contiguous().view(torch.int8),
        "super_scale": _half(d),
    }  # fmt: skip


def _iq4_xs(raw: torch.Tensor) -> Fields:
    d, high, low, qs = _split(raw, 2, 2, 4, 128)
    numbers = _bits(low, 4, 1) | (_bits(high, 2, 1) << 4)
    return {"codes": _bits(qs, 4, 16), "scale": numbers.to(torch.int8) - 32, "super_scale": _half(d)}


def _k(bits: int, group: int, *, minimum: bool = False, offset: int = 0, codebook: str | None = None) -> WeightForm:
    """With scales of scales; symmetric ones have a sign."""
    return WeightForm(
        bits, group, scale="uint8" if minimum else "int8", minimum="uint8" if minimum else None, offset=offset,
        supers="float16", codebook=codebook,
    )  # fmt: skip


BLOCK_TYPES = {
    "Q4_0": BlockType(32, 18, WeightForm(4, 32, offset=8), _q4_0),
    "Q4_1": BlockType(32, 20, WeightForm(4, 32, minimum="float16"), _q4_1),
    "Q5_0": BlockType(32, 22, WeightForm(5, 32, offset=16), _q5_0),
    "Q5_1": BlockType(32, 24, WeightForm(5, 32, minimum="float16"), _q5_1),
    "Q8_0": BlockType(32, 34, WeightForm(8, 32, offset=128), _q8_0),
    "Q2_K": BlockType(256, 84, _k(2, 16, minimum=True), _q2_k),
    "Q3_K": BlockType(256, 110, _k(3, 16, offset=4), _q3_k),
    "Q4_K": BlockType(256, 144, _k(4, 32, minimum=True), _q4_k),
    "Q5_K": BlockType(256, 176, _k(5, 32, minimum=True), _q5_k),
    "Q6_K": BlockType(256, 210, _k(6, 16, offset=32), _q6_k),
    "IQ4_NL": BlockType(32, 18, WeightForm(4, 32, codebook="iq4_nl"), _q4_0),
    "IQ4_XS": BlockType(256, 136, _k(4, 32, codebook="iq4_nl"), _iq4_xs),
}
_BY_FORM = {kind.form: name for name, kind in BLOCK_TYPES.items()}


def unpack_blocks(kind: str, raw: torch.Tensor) -> QuantizedWeight:
    """Rows of blocks, uint8 `[n, row_bytes]`, in the inner form. Raises `CheckpointError` for rows that are no whole
    number of blocks."""
    columns, nbytes, form, unpack = BLOCK_TYPES[kind]
    if raw.ndim != 2 or raw.shape[1] % nbytes:
        raise CheckpointError(f"{list(raw.shape)} bytes are no rows of {kind}.", param="model")
    n, k = raw.shape[0], raw.shape[1] // nbytes * columns
    fields = {name: tensor.flatten(1).contiguous() for name, tensor in unpack(raw.reshape(n, -1, nbytes)).items()}
    return QuantizedWeight(form, n, k, pack(fields.pop("codes"), form.bits), **fields)


class GgufReader:
    """The reader of a GGUF checkpoint's tensors, which give their blocks as bytes."""

    def __init__(self, settings: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
        kinds = {name: tensor.get_dtype() for name, tensor in stored.items()}
        self._kinds = {name: kind for name, kind in kinds.items() if kind not in PLAIN}
        unknown = next((name for name, kind in self._kinds.items() if kind not in BLOCK_TYPES), None)
        if unknown is not None:
            raise UnsupportedModelError(
                f"{unknown} is {kinds[unknown]} in its GGUF file, which is not supported; these are: "
                f"{', '.join((*BLOCK_TYPES, *PLAIN))}.",
                param="model",
            )
        self.names = frozenset(name.removesuffix(".weight") for name in self._kinds)
        used = sorted(set(self._kinds.values()))
        self.title = f"GGUF, {', '.join(used)}" if used else "GGUF"

    def form(self, name: str, n: int, k: int, role: Role) -> WeightForm | None:
        kind = self._kinds.get(f"{name}.weight")
        return BLOCK_TYPES[kind].form if kind is not None else None

    def parts(self, name: str) -> tuple[str, ...]:
        return (f"{name}.weight",)

    def read(self, form: WeightForm, n: int, k: int, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        return unpack_blocks(_BY_FORM[form], tensors["weight"])
