"""Devices for planning: cards by name and by description."""

from __future__ import annotations

import pytest

from core.costs.card_table import GIB
from core.costs.cards import ASSUMED_FLOPS_PER_BYTE, DATASHEET_LAYER_OVERHEAD_S, card, card_of, gpu_spec
from core.errors import DeviceError


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


def test_a_device_stands_for_its_card() -> None:
    first, second, described = gpu_spec("4060 Ti 16GB*2", "16GiB@288GB/s")
    assert card_of(first) is card_of(second) is not None
    assert card_of(first).name == "RTX 4060 Ti 16GB"  # type: ignore[union-attr]
    assert card_of(described) is None


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
