"""What a plan says of cards that torch's wheels do not run on, or that compute with fp16 slowly."""

from __future__ import annotations

import pytest

from core.costs.card_notes import card_notes, lacks_bf16
from core.costs.cards import gpu_spec


def notes(*texts: str, serves_fp16: bool = False) -> tuple[str, ...]:
    return card_notes(gpu_spec(*texts), serves_fp16=serves_fp16)


@pytest.mark.parametrize(
    ("card", "since"),
    [
        ("GTX 1080 Ti (sm_61)", "2.8"),
        ("P100 16GB (sm_60)", "2.8"),
        ("M40 24GB (sm_52)", "2.8"),
        ("Titan V (sm_70)", "2.11"),
    ],
)
def test_cards_that_torchs_wheels_left_behind(card: str, since: str) -> None:
    (note,) = notes(card.partition(" (")[0])
    assert note == (
        f"{card}: planned by its datasheet, but PyTorch's wheels for CUDA 12.8 and newer have no kernels for it since "
        f"PyTorch {since}; those for CUDA 12.6 have"
    )


@pytest.mark.parametrize(
    "card", ["1660 Super", "T4", "A30", "3090", "4090", "H100", "B200", "5090", "MI50", "7900 XTX"]
)
def test_nothing_is_said_of_cards_that_they_run_on(card: str) -> None:
    assert notes(card, serves_fp16=True) == ()


def test_amds_and_intels() -> None:
    (wheel,) = notes("6700 XT")
    assert (
        wheel == "RX 6700 XT (gfx1031): planned by its datasheet, but PyTorch's wheels for ROCm have no kernels for it"
    )
    (intel,) = notes("a770")
    assert intel.startswith("Arc A770 16GB (Xe-HPG): planned by its datasheet") and "Intel's GPUs" in intel
    assert notes("m4 max") == ()


def test_slow_fp16_is_told_where_the_model_is_served_in_it() -> None:
    for card in ("1080", "P40", "M40"):
        assert len(notes(card)) == 1
        _, slow = notes(card, serves_fp16=True)
        assert "fp16 far slower than with fp32" in slow
    assert len(notes("P100", serves_fp16=True)) == 1
    assert len(notes("V100", serves_fp16=True)) == 1


def test_a_card_is_named_once_and_remarks_are_passed_on() -> None:
    assert len(notes("1080*2", "24GiB@936GB/s", "1080", "1070")) == 2
    (laptop,) = notes("4090 laptop")
    assert laptop.startswith("RTX 4090 Laptop (sm_89): planned at its highest power limit")
    (module,) = notes("MI250")
    assert '"MI250*2"' in module
    assert notes() == ()


def test_bf16_is_lacking_before_ampere() -> None:
    lacking = gpu_spec("1080", "V100 32GB*2", "2060 12GB", "1660 Ti", "T4", "2080 Super laptop")
    assert all(lacks_bf16(device) for device in lacking)
    having = gpu_spec("A100", "3050*2", "4090", "5090", "MI50", "6800", "a770", "M1", "24GiB@936GB/s")
    assert not any(lacks_bf16(device) for device in having)
