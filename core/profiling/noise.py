"""How busy devices are with other work while they are measured: what is measured then comes out too low."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from core.devices import Device, DeviceReader

BUSY = 0.25
"""The share of a device's time from which on other work counts."""
_LOOK_S = 0.2


@dataclass(frozen=True, slots=True)
class Noise:
    """The share of its time in which a device had other work, right before it was measured; from 0 to 1."""

    busy: float

    @property
    def is_much(self) -> bool:
        return self.busy > BUSY


def look_at(devices: Sequence[Device]) -> dict[str, Noise]:
    """By torch device, for a fifth of a second. Emulated devices are left out; what nobody can tell is no noise."""
    physical = list({device.torch_device: device for device in devices if not device.is_emulated}.values())
    if not physical:
        return {}
    reader = DeviceReader()
    try:
        reader.read(physical)
        time.sleep(_LOOK_S)
        readings = reader.read(physical)
    finally:
        reader.close()
    return {
        device.torch_device: Noise(min(1.0, max(0.0, reading.utilization or 0.0)))
        for device, reading in zip(physical, readings, strict=True)
    }
