"""The ledger of main memory: whatever is kept there, for whichever engine, is reserved on it. No torch here."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from core.devices.device import Device, DeviceBudget, host_device


class MainMemory:
    """Main memory as far as it may be used, one for a process. Two engines share it while one replaces the other.

    `budget` is the ledger. On it are what the engines and transfers keep in main memory, and as `DEVICES` what logical
    devices in main memory may use: the most that an engine's devices may, since engines share devices. Thread-safe.
    """

    DEVICES = "devices"

    def __init__(self, limit_bytes: int) -> None:
        self.budget = DeviceBudget(host_device(limit_bytes))
        self._lock = threading.Lock()
        self._allowed: dict[DeviceBudget, int] = {}

    def open(self, devices: Sequence[Device]) -> DeviceBudget:
        """The part of the ledger for an engine on `devices`. `close` it once it holds nothing."""
        part = DeviceBudget(self.budget.device, within=self.budget)
        with self._lock:
            self._allowed[part] = _in_main_memory(devices)
            self._set_devices_aside()
        return part

    def close(self, part: DeviceBudget) -> None:
        """The engine's devices are used no more. Safe to call twice."""
        with self._lock:
            self._allowed.pop(part, None)
            self._set_devices_aside()

    def room_bytes(self, devices: Sequence[Device], leaving: DeviceBudget | None = None) -> int:
        """What an engine on `devices` could keep beside them, once the engine with the part `leaving` is gone."""
        with self._lock:
            allowed = [nbytes for part, nbytes in self._allowed.items() if part is not leaving]
            free = self.budget.free_bytes + self.budget.used_by_purpose().get(self.DEVICES, 0)
        if leaving is not None:
            free += leaving.used_bytes
        return max(0, free - max([*allowed, _in_main_memory(devices)]))

    def _set_devices_aside(self) -> None:
        """As much as there is: devices may be larger than the share of main memory that is used unasked."""
        self.budget.hold(self.DEVICES, max(self._allowed.values(), default=0))


def _in_main_memory(devices: Sequence[Device]) -> int:
    return sum(device.memory_limit_bytes for device in devices if device.computes_on_cpu)
