"""Readings of AMD's cards, from what Linux's amdgpu driver shows under /sys. No library is needed.

Source: "GPU sysfs interface" and "HWMON interfaces" of the Linux kernel's amdgpu documentation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from core.devices.readings import DeviceReading

PCI_DEVICES = Path("/sys/bus/pci/devices")
_GENERATIONS = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}
"""Of PCI Express, by gigatransfers per second."""
Value = TypeVar("Value")


def read_amd(name: str, address: str, root: Path = PCI_DEVICES) -> DeviceReading:
    """The device `name`, whose card is at a PCI address such as "0000:03:00.0"."""
    card = root / address
    sensors = next(iter(sorted((card / "hwmon").glob("hwmon*"))), card / "hwmon")
    missing: list[str] = []

    def ask(what: str, parse: Callable[[str], Value], *files: Path) -> Value | None:
        for file in files:
            try:
                return parse(file.read_text().strip())
            except (OSError, ValueError, LookupError):
                continue
        missing.append(what)
        return None

    reading = DeviceReading(
        device=name,
        total_bytes=ask("memory", int, card / "mem_info_vram_total"),
        used_bytes=ask("memory in use", int, card / "mem_info_vram_used"),
        utilization=ask("utilisation", lambda text: int(text) / 100, card / "gpu_busy_percent"),
        temperature_c=ask("temperature", lambda text: int(text) / 1000, sensors / "temp1_input"),
        power_w=ask("power", _watts, sensors / "power1_average", sensors / "power1_input"),
        power_limit_w=ask("power limit", _watts, sensors / "power1_cap"),
        pcie_generation=ask("PCIe generation", _generation, card / "current_link_speed"),
        pcie_width=ask("PCIe width", int, card / "current_link_width"),
        unavailable="throttling and other processes' memory are read on NVIDIA cards only",
    )
    if not missing:
        return reading
    return replace(reading, unavailable=f"not in {card}: {', '.join(missing)}; {reading.unavailable}")


def _watts(text: str) -> float:
    return int(text) / 1e6


def _generation(text: str) -> int:
    """ "16.0 GT/s PCIe" is 4."""
    return _GENERATIONS[float(text.split(maxsplit=1)[0])]
