"""What is told of GPUs, from what torch says of them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from core.devices import probe_machine

WHEEL = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
GIB = 1024**3


@dataclass
class Properties:
    """What torch tells of a card."""

    name: str
    major: int = 8
    minor: int = 6
    total_memory: int = 24 * GIB
    is_integrated: int = 0
    gcnArchName: str = ""


def pretend(monkeypatch: pytest.MonkeyPatch, *cards: Properties, kernels: list[str] = WHEEL, hip: bool = False) -> None:
    """A machine with these cards; those that are not used may not be asked for their free memory."""

    def free_and_total(ordinal: int) -> tuple[int, int]:
        assert not cards[ordinal].is_integrated and cards[ordinal].major > 3, "this makes a context"
        return 20 * GIB, cards[ordinal].total_memory - GIB

    monkeypatch.setattr(torch.version, "cuda", None if hip else "12.8")
    monkeypatch.setattr(torch.version, "hip", "7.0" if hip else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda ordinal: cards[ordinal])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: kernels)
    monkeypatch.setattr(torch.cuda, "mem_get_info", free_and_total)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda ordinal: 2 * GIB)


def test_cards_are_told_with_their_memory_and_their_drawbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Properties("NVIDIA GB10", 12, 1, 120 * GIB, is_integrated=1)
    pretend(monkeypatch, Properties("RTX 3090"), Properties("Tesla K80", 3, 7), board)
    good, old, inside = probe_machine().gpus
    assert (good.name, good.product, good.drawback, good.is_usable) == ("cuda:0", "RTX 3090", "", True)
    assert (good.total_bytes, good.free_bytes, good.ours_bytes) == (23 * GIB, 20 * GIB, 2 * GIB)
    assert not old.is_usable
    assert "has no kernels for its compute capability 3.7" in old.drawback and "sm_75, sm_80" in old.drawback
    assert inside.is_usable and "shares main memory" in inside.drawback
    assert inside.free_bytes <= probe_machine().cpu.total_bytes


@pytest.mark.parametrize(
    ("product", "inside"),
    [
        ("AMD Radeon Graphics", True),
        ("AMD Radeon(TM) Graphics", True),
        ("AMD Radeon 780M Graphics", True),
        ("AMD Radeon 8060S Graphics", True),
        ("AMD Radeon RX 7900 XTX", False),
        ("AMD Radeon PRO W7900", False),
    ],
)
def test_amds_processors_with_graphics_are_told_by_name(
    monkeypatch: pytest.MonkeyPatch, product: str, inside: bool
) -> None:
    pretend(monkeypatch, Properties(product, gcnArchName="gfx1103:xnack-"), kernels=["gfx1103"], hip=True)
    (found,) = probe_machine().gpus
    assert (found.name, found.torch_device, found.is_usable) == ("rocm:0", "cuda:0", True)
    assert bool(found.drawback) == inside


def test_an_amd_chip_without_kernels_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, Properties("AMD Radeon VII", gcnArchName="gfx906"), kernels=["gfx1100"], hip=True)
    (found,) = probe_machine().gpus
    assert not found.is_usable and "no kernels for its gfx906" in found.drawback
