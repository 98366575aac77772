"""What there is to say of a card that is planned for by its datasheet: whether torch's wheels run on it, and how."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from core.costs import PlacementDevice
from core.costs.card_table import Card
from core.costs.cards import card_of
from core.devices.kernels import runs_on_amd, runs_on_nvidia

FIRST_WITH_BF16 = 80
"""NVIDIA's compute capability, 8.0, from which on cards compute with bf16."""

CUDA_WHEEL = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
"""Kernels in PyTorch's wheels for CUDA 13, which are those on PyPI from 2.11 on (PyTorch's CUDA support matrix)."""

ROCM_WHEEL = (
    "gfx900", "gfx906", "gfx908", "gfx90a", "gfx942", "gfx950", "gfx1030", "gfx1100", "gfx1101", "gfx1102", "gfx1103",
    "gfx1150", "gfx1151", "gfx1200", "gfx1201",
)  # fmt: skip
"""Kernels in PyTorch's wheels for ROCm 7 (its manywheel build, 2.13)."""

_FIRST_WITH_FAST_FP16 = 70
_FAST_FP16_BEFORE = {60}
_VOLTA = 70


def lacks_bf16(device: PlacementDevice) -> bool:
    """Whether a device of `gpu_spec` is a card that does not compute with bf16: NVIDIA's before Ampere."""
    card = card_of(device)
    return card is not None and (card.compute_capability or FIRST_WITH_BF16) < FIRST_WITH_BF16


def card_notes(devices: Sequence[PlacementDevice], *, serves_fp16: bool) -> tuple[str, ...]:
    """What a plan for these devices of `gpu_spec` should say of their cards, each once. `serves_fp16`: the model is
    served in fp16."""
    cards = dict.fromkeys(card for device in devices if (card := card_of(device)) is not None)
    return tuple(f"{card.name} ({card.chip}): {note}" for card in cards for note in _notes(card, serves_fp16))


def _notes(card: Card, serves_fp16: bool) -> Iterator[str]:
    capability = card.compute_capability
    planned = "planned by its datasheet, but"
    if capability is not None:
        if not runs_on_nvidia(*divmod(capability, 10), CUDA_WHEEL):
            since = "2.11" if capability >= _VOLTA else "2.8"
            yield (
                f"{planned} PyTorch's wheels for CUDA 12.8 and newer have no kernels for it since PyTorch {since}; "
                "those for CUDA 12.6 have"
            )
        if serves_fp16 and capability < _FIRST_WITH_FAST_FP16 and capability not in _FAST_FP16_BEFORE:
            yield "computes with fp16 far slower than with fp32; planned at the fp32 rate, the most it can reach"
    elif card.chip.startswith("gfx"):
        if not runs_on_amd(card.chip, ROCM_WHEEL):
            yield f"{planned} PyTorch's wheels for ROCm have no kernels for it"
    elif card.chip.startswith("Xe"):
        yield f"{planned} no model can be served on Intel's GPUs"
    if card.remark:
        yield card.remark
