"""Cards by name and by description."""

from __future__ import annotations

import pytest

from core.costs.cards import ASSUMED_FLOPS_PER_BYTE, CARDS, DATASHEET_LAYER_OVERHEAD_S, GIB, card, gpu_spec
from core.errors import DeviceError


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("3090", "RTX 3090"),
        ("rtx3090", "RTX 3090"),
        ("RTX-3090", "RTX 3090"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("3090 24GB", "RTX 3090"),
        ("3090ti", "RTX 3090 Ti"),
        ("5070ti", "RTX 5070 Ti"),
        ("4070 ti super", "RTX 4070 Ti Super"),
        ("3080", "RTX 3080 10GB"),
        ("3080 12gb", "RTX 3080 12GB"),
        ("3080 Ti", "RTX 3080 Ti"),
        ("4060ti", "RTX 4060 Ti 8GB"),
        ("4060 Ti 16 GB", "RTX 4060 Ti 16GB"),
        ("rtx a6000", "RTX A6000"),
        ("a6000", "RTX A6000"),
        ("NVIDIA A100-80GB", "A100 80GB"),
        ("a100", "A100 40GB"),
        ("h100", "H100 PCIe"),
        ("H100 SXM", "H100 SXM"),
        ("Tesla T4", "T4"),
        ("v100 32gb", "V100 32GB"),
        ("rx7900xtx", "RX 7900 XTX"),
        ("AMD Radeon RX 7900 XT", "RX 7900 XT"),
        ("AMD Instinct MI300X", "MI300X"),
        ("Apple M2 Ultra", "M2 Ultra 64GB"),
        ("m2ultra192gb", "M2 Ultra 192GB"),
        ("M4 Max 128GB", "M4 Max 128GB"),
    ],
)
def test_cards_are_found_however_they_are_written(asked: str, name: str) -> None:
    assert card(asked).name == name


def test_every_card_is_found_by_its_own_name_and_has_figures_of_a_card() -> None:
    assert len({found.name for found in CARDS}) == len(CARDS)
    for found in CARDS:
        assert card(found.name) == found
        assert 4 * GIB < found.limit_bytes < 1024 * GIB
        assert 200e9 < found.profile.bandwidth_bytes_s < 10e12
        assert 20 < found.profile.flops_at(1) / found.profile.bandwidth_bytes_s < 500


def test_figures() -> None:
    found = card("3090")
    assert (found.limit_bytes, found.profile.bandwidth_bytes_s) == (24 * GIB, 936e9)
    assert found.profile.flops_at(1) == found.profile.flops_at(4096) == 71e12
    assert card("5070ti").profile.bandwidth_bytes_s == 896e9
    assert card("4090").profile.flops_at(1) == pytest.approx(165.2e12)


@pytest.mark.parametrize(
    ("asked", "close"), [("3095", "RTX 3090"), ("rtx 4070 supr", "RTX 4070 Super"), ("H300", "H200"), ("", "RTX 2060")]
)
def test_unknown_cards_are_refused_with_those_that_look_like_them(asked: str, close: str) -> None:
    with pytest.raises(DeviceError) as caught:
        card(asked)
    assert close in caught.value.message
    assert "24GiB@936GB/s" in caught.value.message
    assert caught.value.param == "gpu"


def test_a_card_is_a_device_of_all_its_memory_at_datasheet_speed() -> None:
    device = card("3090")
    assert (device.name, device.profile.name, device.limit_bytes) == ("RTX 3090", "RTX 3090", 24 * GIB)
    assert device.profile.source == "datasheet"
    assert device.profile.layer_overhead_s == DATASHEET_LAYER_OVERHEAD_S == 0.3e-3
    assert device.profile.flops_at(1) == device.profile.flops_at(4096) == 71e12


def test_a_card_is_described_by_size_and_speed() -> None:
    given, assumed = gpu_spec("24GiB@936GB/s/71TFLOPS", " 16 GiB @ 896 GB/s ")
    assert (given.limit_bytes, given.profile.bandwidth_bytes_s, given.profile.flops_at(1)) == (24 * GIB, 936e9, 71e12)
    assert (assumed.limit_bytes, assumed.profile.bandwidth_bytes_s) == (16 * GIB, 896e9)
    assert assumed.profile.flops_at(1) == 896e9 * ASSUMED_FLOPS_PER_BYTE
    assert given.name == "24GiB@936GB/s/71TFLOPS"


def test_several_of_a_name_are_numbered() -> None:
    devices = gpu_spec("3090*2", "5070ti", "RTX 3090", "8GiB@1TB/s * 2")
    assert [device.name for device in devices] == [
        "RTX 3090#0",
        "RTX 3090#1",
        "RTX 5070 Ti",
        "RTX 3090#2",
        "8GiB@1TB/s#0",
        "8GiB@1TB/s#1",
    ]
    assert all(device.profile.name == device.name for device in devices)
    assert gpu_spec() == ()


@pytest.mark.parametrize(
    "text",
    [
        "24GiB@936",
        "24@936GB/s",
        "@936GB/s",
        "24GiB@",
        "24GiB@936GB/s,cpu",
        "24GiB@936GB/s/71",
        "24GiB@0GB/s",
        "3090*0",
        "3090*",
        "3090*x",
        "*2",
        "3090*2*2",
        "nonsense",
    ],
)
def test_what_is_neither_is_refused(text: str) -> None:
    with pytest.raises(DeviceError, match="24GiB@936GB/s") as caught:
        gpu_spec("3090", text)
    assert caught.value.param == "gpu"
