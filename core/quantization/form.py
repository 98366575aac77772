"""How a quantized weight is kept, and what that takes. Pure: no torch, so plans can use it."""

from __future__ import annotations

import math
from dataclasses import dataclass

SUPER_GROUP = 256
"""Columns that share a super scale."""

CODE_WIDTH = 8
"""Columns of packed codes come in so many, so that a plane of single bits fills its bytes."""

TILE_BYTES = 8 << 20
"""Of a weight, dequantized to fp32 at one time."""

DTYPE_BYTES = {"uint8": 1, "int8": 1, "float16": 2, "bfloat16": 2, "float32": 4, "int32": 4}

CODEBOOKS: dict[str, tuple[float, ...]] = {
    # Quantiles of a normal distribution; Dettmers et al., QLoRA (2023), appendix E.
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    # ggml's kvalues_iq4nl.
    "iq4_nl": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
}  # fmt: skip


def planes(bits: int) -> tuple[int, ...]:
    """The widths of the planes of codes with so many bits, lowest bits first."""
    if bits == 8:
        return (8,)
    return tuple(width for width in (4, 2, 1) if bits & width)


@dataclass(frozen=True, slots=True)
class WeightForm:
    """The form of a weight; `core.quantization` says what each tensor means. Dtypes by name.

    Attributes:
        bits: of a code, 2 to 8.
        group: columns that share a scale; 0: all of a row.
        rows: rows that share a scale; 0: all of them.
        offset: what is subtracted from every code.
        codebook: a name in `CODEBOOKS`, whose entries the codes number.
        fp8: "float8_e4m3fn" or "float8_e5m2", where codes are such numbers.
        supers: dtype of super scales and super minima; then `scale` and `minimum` are whole numbers.
        ordered: whether columns are permuted.
    """

    bits: int
    group: int
    scale: str = "float16"
    rows: int = 1
    offset: int = 0
    zero: str | None = None
    minimum: str | None = None
    codebook: str | None = None
    fp8: str | None = None
    supers: str | None = None
    ordered: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"codes of {self.bits} bits")

    def covers(self, n: int, k: int) -> bool:
        """Whether a weight `[n, k]` can have this form."""
        return n > 0 and k > 0 and (self.bits == 8 or k % CODE_WIDTH == 0)

    def row_bytes(self, k: int) -> int:
        """Of the codes of one row."""
        return k * self.bits // 8

    def groups(self, n: int, k: int) -> tuple[int, int]:
        """The shape of scales."""
        return math.ceil(n / (self.rows or n)), math.ceil(k / (self.group or k))

    def tensors(self, n: int, k: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of each tensor of a weight `[n, k]`, by name."""
        each, above = self.groups(n, k), (n, math.ceil(k / SUPER_GROUP))
        found: dict[str, tuple[tuple[int, ...], str]] = {"codes": ((n, self.row_bytes(k)), "uint8")}
        found["scale"] = (each, self.scale)
        if self.zero is not None:
            found["zero"] = (each, self.zero)
        if self.minimum is not None:
            found["minimum"] = (each, self.minimum)
        if self.supers is not None:
            found["super_scale"] = (above, self.supers)
            if self.minimum is not None:
                found["super_minimum"] = (above, self.supers)
        if self.ordered:
            found["order"] = ((k,), "int32")
        return found

    def nbytes(self, n: int, k: int) -> int:
        """What a weight `[n, k]` takes."""
        return sum(math.prod(shape) * DTYPE_BYTES[dtype] for shape, dtype in self.tensors(n, k).values())

    @property
    def title(self) -> str:
        """For people and for logs, such as `int4, groups of 64`."""
        if self.fp8 is not None:
            return "fp8"
        kind = self.codebook or f"int{self.bits}"
        return kind if self.group == 0 else f"{kind}, groups of {self.group}"
