"""What a reading of a device has."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DeviceReading:
    """One device at one moment. Memory is the physical device's, with everybody's use of it.

    What could not be read is None, and `unavailable` says why.

    Attributes:
        utilization: share of time busy, 0 to 1.
        pcie_generation, pcie_width: of the link as it is now; cards at rest slow it down.
        throttling: why the card runs slower than it could; empty if it does not.
        other_bytes: memory in use by other processes.
    """

    device: str
    total_bytes: int | None = None
    used_bytes: int | None = None
    utilization: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    pcie_generation: int | None = None
    pcie_width: int | None = None
    throttling: tuple[str, ...] | None = None
    other_bytes: int | None = None
    unavailable: str | None = None
