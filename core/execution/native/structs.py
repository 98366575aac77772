"""The C side's structures, field by field as in `kernels.h` and `layer.c`. Pointers are addresses; strides count
elements."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import torch

from core.quantization.form import SUPER_GROUP
from core.quantization.weight import QuantizedWeight

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""Element types of the kernels and their numbers in `common.h`."""

_NUMBERS = {**DTYPES, torch.uint8: 3, torch.int8: 4}
"""Beside them, of a quantized weight's scales, as in `quantized.h`."""

_i64, _double = ctypes.c_int64, ctypes.c_double


def _fields(names: str) -> list[tuple[str, Any]]:
    return [(name, _i64) for name in names.split()]


class Quantized(ctypes.Structure):
    """A quantized weight, whose tensors have to outlive it."""

    _fields_ = _fields(
        "bits group rows offset k row_bytes groups supers scale_type zero_type minimum_type super_type "
        "codes scale zero minimum super_scale super_minimum codebook panels"
    )

    @classmethod
    def of(cls, weight: QuantizedWeight, meanings: torch.Tensor | None, *, panels: bool = False) -> Quantized:
        """`meanings` are what codes mean, fp32 `[16]` or `[256]`, where that is not themselves; `panels`: whether the
        tensors are in the order of `panels.c`."""
        form, k = weight.form, weight.k
        parts = (weight.scale, weight.zero, weight.minimum, weight.super_scale)
        types = [0 if part is None else _NUMBERS[part.dtype] for part in parts]
        tensors = (weight.codes, *parts, weight.super_minimum, meanings)
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        rows = 0 if form.rows == 0 else form.rows
        group = 0 if form.group >= k else form.group
        counts = k, weight.codes.shape[1], weight.scale.shape[1], -(-k // SUPER_GROUP)
        return cls(form.bits, group, rows, form.offset, *counts, *types, *addresses, panels)


class Weights(ctypes.Structure):
    """A linear layer's weight `[n, k]`, bias `[n]` and, if it is packed, exponents, which have to outlive it; or, for
    a quantized weight, its view instead."""

    _fields_ = _fields("type n k ld weight bias exponents quantized")

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None, exponents: torch.Tensor | None = None) -> Weights:
        n, k = weight.shape
        extra = [0 if tensor is None else tensor.data_ptr() for tensor in (bias, exponents)]
        return cls(DTYPES[weight.dtype], n, k, weight.stride(0), weight.data_ptr(), *extra, 0)


class AttentionLayer(ctypes.Structure):
    """One layer's attention: shapes, pages and projections."""

    _fields_ = [
        *_fields("type heads kv_heads dim block_size window"),
        ("k_strides", _i64 * 3),
        ("v_strides", _i64 * 3),
        *_fields("k_pages v_pages sinks q_norm k_norm"),
        *[(name, Weights) for name in "qkvo"],
        *[(name, _double) for name in ("scale", "softcap", "norm_eps")],
    ]


class StepView(ctypes.Structure):
    """A step's batch, which has to outlive it."""

    _fields_ = _fields("tokens seqs max_blocks tables query_start seq_lens slots")


def weights_array(items: Iterable[Weights]) -> ctypes.Array[Weights]:
    """The structures one after the other."""
    values = list(items)
    return (Weights * len(values))(*values)
