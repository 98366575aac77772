"""Random weights in any form, and what they mean, by other code than the product's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from core.quantization.form import CODEBOOKS, WeightForm
from core.quantization.weight import DTYPES, QuantizedWeight, pack

FORMS = {
    "int8": WeightForm(8, 32, offset=128),
    "rows": WeightForm(8, 0, scale="float32", offset=128),
    **{f"int{bits}": WeightForm(bits, 16, offset=1 << (bits - 1)) for bits in (2, 3, 4, 5, 6, 7)},
    "short last group": WeightForm(4, 48, offset=8),
    "zeros": WeightForm(4, 32, zero="uint8"),
    "zeros of fractions": WeightForm(3, 64, zero="float16"),
    "minimum": WeightForm(5, 32, minimum="float16"),
    "super": WeightForm(4, 32, scale="uint8", minimum="uint8", supers="float16"),
    "signed super": WeightForm(6, 16, scale="int8", offset=32, supers="float16"),
    "codebook": WeightForm(4, 64, scale="float32", codebook="nf4"),
    "super codebook": WeightForm(4, 32, scale="int8", codebook="iq4_nl", supers="float16"),
    "fp8 tensor": WeightForm(8, 0, scale="float32", rows=0, fp8="float8_e4m3fn"),
    "fp8 rows": WeightForm(8, 0, scale="bfloat16", fp8="float8_e5m2"),
    "fp8 blocks": WeightForm(8, 32, scale="float32", rows=16, fp8="float8_e4m3fn"),
    "ordered": WeightForm(4, 32, zero="uint8", ordered=True),
}


def random_weight(form: WeightForm, n: int, k: int, seed: int = 0) -> tuple[QuantizedWeight, np.ndarray[Any, Any]]:
    """A weight, and its values in float64."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << form.bits, (n, k), dtype=np.uint8)
    if form.fp8 is not None:
        codes &= 0xBB  # no NaN, nothing huge
    tensors = {"codes": pack(torch.from_numpy(codes), form.bits)}
    for name, (shape, dtype) in form.tensors(n, k).items():
        if name == "order":
            tensors[name] = torch.from_numpy(rng.permutation(k).astype(np.int32))
        elif name != "codes":
            whole = dtype in ("uint8", "int8")
            low, high = (-8 if dtype == "int8" else 0, 8) if whole else (0.01, 0.05)
            numbers = rng.integers(low, high, shape) if whole else rng.uniform(low, high, shape)
            tensors[name] = torch.from_numpy(np.asarray(numbers)).to(DTYPES[dtype])
    return QuantizedWeight(form, n, k, **tensors), _meaning(form, codes, tensors)


def _meaning(form: WeightForm, codes: np.ndarray[Any, Any], tensors: dict[str, torch.Tensor]) -> np.ndarray[Any, Any]:
    """One number at a time, as `core.quantization` says."""
    n, k = codes.shape
    number = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    if form.fp8 is not None:
        values = torch.from_numpy(codes).view(DTYPES[form.fp8]).double().numpy()
    elif form.codebook is not None:
        values = np.array(CODEBOOKS[form.codebook], dtype=np.float32).astype(np.float64)[codes]
    else:
        values = codes.astype(np.float64) - form.offset
    weight = np.empty((n, k))
    for row in range(n):
        for column in range(k):
            at = (row // (form.rows or n), column // (form.group or k))
            above = (row, column // 256)
            scale = number["scale"][at] * (number["super_scale"][above] if form.supers else 1)
            value = scale * (values[row, column] - (number["zero"][at] if form.zero else 0))
            if form.minimum:
                value += number["minimum"][at] * (number["super_minimum"][above] if form.supers else 1)
            place = int(number["order"][column]) if form.ordered else column
            weight[row, place] = value
    return weight


def nbytes(weight: QuantizedWeight) -> int:
    form = weight.form
    return sum(math.prod(shape) * DTYPES[dtype].itemsize for shape, dtype in form.tensors(weight.n, weight.k).values())
