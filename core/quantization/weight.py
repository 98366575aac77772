"""A quantized weight's tensors, what they mean in fp32, and the product that every device can compute."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from core.quantization.form import CODEBOOKS, SUPER_GROUP, TILE_BYTES, WeightForm, planes

DTYPES: dict[str, torch.dtype] = {
    "uint8": torch.uint8, "int8": torch.int8, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "float32": torch.float32, "int32": torch.int32, "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A weight `[n, k]` in the inner form; `core.quantization` describes the tensors."""

    form: WeightForm
    n: int
    k: int
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None
    minimum: torch.Tensor | None = None
    super_scale: torch.Tensor | None = None
    super_minimum: torch.Tensor | None = None
    order: torch.Tensor | None = None

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows `first .. last - 1` in fp32, columns in the order of the codes."""
        return self._dense(slice(first, last))

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows by number, int64 `[R]`, in fp32 and with columns in the weight's own order."""
        return _in_order(self._dense(rows), self.order)

    def dequantize(self) -> torch.Tensor:
        """The whole weight `[n, k]` in fp32."""
        return _in_order(self._dense(slice(0, self.n)), self.order)

    def _dense(self, rows: slice | torch.Tensor) -> torch.Tensor:
        values = self._values(self.codes[rows])
        if self.zero is not None:
            values -= self._spread(self.zero, rows)
        values *= self._spread(self.scale, rows, self.super_scale)
        if self.minimum is not None:
            values += self._spread(self.minimum, rows, self.super_minimum)
        return values

    def _values(self, codes: torch.Tensor) -> torch.Tensor:
        form = self.form
        if form.fp8 is not None:
            return codes.view(DTYPES[form.fp8]).float()
        numbers = unpack(codes, form.bits, self.k)
        if form.codebook is not None:
            return codebook(form.codebook, codes.device)[numbers.int()]
        values = numbers.float()
        return values.sub_(form.offset) if form.offset else values

    def _spread(
        self, numbers: torch.Tensor, rows: slice | torch.Tensor, above: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What belongs to groups, for every column of `rows`: `[R, k]`, or `[R, 1]` where a row is one group."""
        form = self.form
        if form.rows == 1:
            numbers = numbers[rows]
        else:  # blocks of rows
            which = torch.arange(self.n, device=numbers.device)[rows]
            numbers = numbers[which // (form.rows or self.n)]
        numbers = numbers.float()
        if numbers.shape[1] > 1 or above is not None:
            numbers = numbers.repeat_interleave(form.group or self.k, 1)[:, : self.k]
        if above is not None:
            numbers *= above[rows].float().repeat_interleave(SUPER_GROUP, 1)[:, : self.k]
        return numbers


def _in_order(dense: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    if order is None:
        return dense
    result = torch.empty_like(dense)
    result[:, order.long()] = dense
    return result


@functools.cache
def codebook(name: str, device: torch.device) -> torch.Tensor:
    """fp32 `[16]`."""
    return torch.tensor(CODEBOOKS[name], dtype=torch.float32, device=device)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes `[n, k]`, one a byte, as `core.quantization` packs them: `[n, k * bits / 8]`."""
    if bits == 8:
        return codes.contiguous()
    parts, shift = [], 0
    for width in planes(bits):
        each = 8 // width
        plane = ((codes >> shift) & ((1 << width) - 1)).view(codes.shape[0], -1, each)
        packed = plane[..., 0].clone()
        for index in range(1, each):
            packed |= plane[..., index] << (index * width)
        parts.append(packed)
        shift += width
    return torch.cat(parts, dim=1)


def unpack(packed: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """The reverse of `pack`: uint8 `[n, k]`."""
    if bits == 8:
        return packed
    codes: torch.Tensor | None = None
    start = shift = 0
    for width in planes(bits):
        nbytes = k * width // 8
        part = packed[:, start : start + nbytes, None]
        places = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
        plane = ((part >> places) & ((1 << width) - 1)).flatten(1)
        codes = plane if codes is None else codes | (plane << shift)
        start, shift = start + nbytes, shift + width
    assert codes is not None
    return codes


def product(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x` `[..., k]` times the weight, transposed: `[..., n]` in the dtype of `x`.

    Rows are dequantized in fp32 and rounded to that dtype, some at a time; so the result is that of the dequantized
    weight.
    """
    if weight.order is not None:
        x = x.index_select(-1, weight.order)
    tile = max(1, TILE_BYTES // (4 * weight.k))
    if weight.n <= tile:
        return F.linear(x, weight.rows(0, weight.n).to(x.dtype), bias)
    out = x.new_empty((*x.shape[:-1], weight.n))
    for first in range(0, weight.n, tile):
        last = min(first + tile, weight.n)
        part = None if bias is None else bias[first:last]
        out[..., first:last] = F.linear(x, weight.rows(first, last).to(x.dtype), part)
    return out
