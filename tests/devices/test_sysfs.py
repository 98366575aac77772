"""AMD's cards are read from files as the amdgpu driver shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.devices.sysfs import read_amd

ADDRESS = "0000:03:00.0"
FILES = {
    "mem_info_vram_total": "25753026560",
    "mem_info_vram_used": "1073741824",
    "gpu_busy_percent": "87",
    "current_link_speed": "16.0 GT/s PCIe",
    "current_link_width": "8",
    "hwmon/hwmon3/temp1_input": "64000",
    "hwmon/hwmon3/power1_average": "212000000",
    "hwmon/hwmon3/power1_cap": "355000000",
}


@pytest.fixture
def card(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        file = tmp_path / ADDRESS / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return tmp_path


def test_a_card_is_read(card: Path) -> None:
    reading = read_amd("rocm:0", ADDRESS, card)
    assert reading.device == "rocm:0"
    assert (reading.total_bytes, reading.used_bytes) == (25753026560, 1 << 30)
    assert (reading.utilization, reading.temperature_c) == (0.87, 64.0)
    assert (reading.power_w, reading.power_limit_w) == (212.0, 355.0)
    assert (reading.pcie_generation, reading.pcie_width) == (4, 8)
    assert reading.throttling is None and reading.other_bytes is None
    assert reading.unavailable is not None and "NVIDIA" in reading.unavailable


def test_newer_cards_tell_their_power_now(card: Path) -> None:
    sensors = card / ADDRESS / "hwmon" / "hwmon3"
    (sensors / "power1_average").rename(sensors / "power1_input")
    assert read_amd("rocm:0", ADDRESS, card).power_w == 212.0


@pytest.mark.parametrize("text", ["", "Unknown", "9.9 GT/s"])
def test_what_cannot_be_read_is_named(card: Path, text: str) -> None:
    (card / ADDRESS / "current_link_speed").write_text(text)
    (card / ADDRESS / "gpu_busy_percent").unlink()
    reading = read_amd("rocm:0", ADDRESS, card)
    assert (reading.pcie_generation, reading.utilization, reading.pcie_width) == (None, None, 8)
    assert reading.unavailable is not None and "utilisation, PCIe generation" in reading.unavailable


def test_a_card_that_is_not_there_has_no_reading(tmp_path: Path) -> None:
    reading = read_amd("rocm:0", ADDRESS, tmp_path)
    assert reading.total_bytes is None and reading.temperature_c is None
    assert reading.unavailable is not None and str(tmp_path) in reading.unavailable
