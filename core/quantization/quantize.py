"""Quantizing plain weights when they are loaded, without calibration."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from core.errors import CheckpointError, UnsupportedModelError
from core.quantization.choice import HEAD, QuantizeChoice
from core.quantization.form import CODE_WIDTH, WeightForm
from core.quantization.reader import Role
from core.quantization.weight import QuantizedWeight, pack

ROWS_BYTES = 32 << 20
"""Of a weight in fp32, quantized at one time."""

_ROUNDS, _NORM, _BETA, _GROWTH = 20, 0.7, 10.0, 1.01
"""Half-quadratic quantization's own: rounds at most, the norm that errors are made small in, and how strictly."""


class Quantizer:
    """The reader of plain checkpoints that are quantized on load: int8 rounded to nearest, int4 by half-quadratic
    search (Badri and Shaji, 2023, "Half-Quadratic Quantization of Large Machine Learning Models")."""

    def __init__(self, choice: QuantizeChoice) -> None:
        self._choice = choice
        self.names = frozenset[str]()
        self.title = choice.title

    def form(self, name: str, n: int, k: int, role: Role) -> WeightForm | None:
        """Raises `UnsupportedModelError` for a layer that cannot be quantized so."""
        form = self._choice.form
        if role == "embedding" or not self._choice.takes(name, is_head=role == "head"):
            return None
        if not form.covers(n, k):
            part = HEAD if role == "head" else name
            raise UnsupportedModelError(
                f"{name} has {k} columns; {self._choice.kind} takes multiples of {CODE_WIDTH}. Leave it as it is "
                f"(quantize_keep={part}), or quantize to int8.",
                param="quantize",
            )
        return form

    def parts(self, name: str) -> tuple[str, ...]:
        return (f"{name}.weight",)

    def read(self, form: WeightForm, n: int, k: int, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        return quantize(tensors["weight"], form)


@torch.no_grad()
def quantize(weight: torch.Tensor, form: WeightForm) -> QuantizedWeight:
    """`weight` `[n, k]` in one of the forms of `QuantizeChoice`. Raises `CheckpointError` for numbers without end, or
    beyond what a scale of the form holds."""
    if weight.ndim != 2:
        raise CheckpointError(f"a weight of shape {list(weight.shape)} is not that of a linear layer.", param="model")
    n, k = weight.shape
    codes = torch.empty((n, form.row_bytes(k)), dtype=torch.uint8)
    scale = torch.empty(form.groups(n, k), dtype=torch.float16)
    zero = torch.empty_like(scale) if form.zero is not None else None
    step = max(1, ROWS_BYTES // (4 * k))
    for first in range(0, n, step):
        part = slice(first, min(first + step, n))
        grouped = _grouped(weight[part].float(), form.group)
        if form.zero is None:
            found, scale[part] = _nearest(grouped)
        else:
            found, scale[part], zero[part] = _half_quadratic(grouped, (1 << form.bits) - 1)  # type: ignore[index]
        codes[part] = pack(found.flatten(1)[:, :k].to(torch.uint8), form.bits)
    return QuantizedWeight(form, n, k, codes, scale, zero=zero)


def _grouped(rows: torch.Tensor, group: int) -> torch.Tensor:
    """`[n, k]` to `[n, groups, group]`; a short last group is filled up with its last column."""
    lacking = -rows.shape[1] % group
    if lacking:
        rows = torch.cat((rows, rows[:, -1:].expand(-1, lacking)), dim=1)
    return rows.view(len(rows), -1, group)


def _half(scale: torch.Tensor) -> torch.Tensor:
    """Scales as float16 has them, rounded up where that is less, so that no code leaves its range."""
    half = scale.half()
    if not bool(torch.isfinite(half).all()):
        raise CheckpointError("weights are too large to be quantized, or not finite.", param="model")
    return torch.where(half.float() < scale, torch.nextafter(half, torch.full_like(half, torch.inf)), half)


def _nearest(grouped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes about 128, and scales."""
    scale = _half(grouped.abs().amax(-1) / 127)
    codes = (grouped / scale.float().clamp_min(1e-30)[..., None]).round_().clamp_(-127, 127).add_(128)
    return codes, scale


def _half_quadratic(grouped: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes from 0 to `top`, scales and zeros.

    The scale is that of the range, which includes 0, so that zeros stay small. The zero is moved so that the errors are
    small in a norm that lets a few weights be far off: shrink the errors, and take the mean of what codes would need
    for the rest; until it does not help.
    """
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = _half((high - low) / top).float().clamp_min(2.0**-24)
    zero = (-low / scale).half()
    best, best_zero = _error(grouped, scale, zero.float(), top), zero
    beta, current = _BETA, zero.float()
    for _ in range(_ROUNDS):
        codes = _codes(grouped, scale, current, top)
        errors = grouped - (codes - current) * scale
        shrunk = errors.abs()
        shrunk = torch.sign(errors) * torch.relu(shrunk - shrunk.clamp_min(1e-8).pow(_NORM - 1) / beta)
        current = (codes - (grouped - shrunk) / scale).mean(-1, keepdim=True).half().float()
        error = _error(grouped, scale, current, top)
        better = error < best
        if not bool(better.any()):
            break
        best, best_zero = torch.where(better, error, best), torch.where(better, current.half(), best_zero)
        beta *= _GROWTH
    return _codes(grouped, scale, best_zero.float(), top), scale[..., 0].half(), best_zero[..., 0]


def _codes(grouped: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int) -> torch.Tensor:
    return (grouped / scale + zero).round_().clamp_(0, top)


def _error(grouped: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int) -> torch.Tensor:
    """Mean squared error of each group."""
    return ((_codes(grouped, scale, zero, top) - zero) * scale).sub_(grouped).square_().mean(-1, keepdim=True)
