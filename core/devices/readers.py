"""Snapshots of what devices are doing: memory, utilisation, temperature, power."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from dataclasses import replace
from types import ModuleType
from typing import Any

import psutil

from core.devices.device import Device
from core.devices.probe import torch_memory
from core.devices.readings import DeviceReading
from core.devices.sysfs import read_amd

_THROTTLING = {
    0x04: "power limit",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "temperature (driver)",
    0x40: "temperature (hardware)",
    0x80: "power brake",
}
"""NVML's bits (`nvmlClocksEventReasons`); being idle and clocks that somebody has set are no throttling."""


class DeviceReader:
    """Reads devices; thread-safe. NVML's session is opened for the first CUDA device, and ended by `close`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._nvml: ModuleType | None = None
        self._nvml_missing: str | None = None  # the reason, once it was tried
        psutil.cpu_percent(interval=None)  # the first call only starts the clock

    def read(self, devices: Iterable[Device]) -> list[DeviceReading]:
        """One reading per device, in their order. Parts of one device share what is read of it."""
        found: dict[str, DeviceReading] = {}
        with self._lock:
            for device in devices:
                known = next((each for each in found.values() if each.device == device.torch_device), None)
                if known is None:
                    known = replace(self._read(device), device=device.torch_device)
                found[device.name] = known
        return [replace(reading, device=name) for name, reading in found.items()]

    def close(self) -> None:
        """End NVML's session. Safe to call twice; reading again opens a new one."""
        with self._lock:
            if self._nvml is not None:
                self._nvml.nvmlShutdown()
            self._nvml = self._nvml_missing = None

    def _read(self, device: Device) -> DeviceReading:
        if device.computes_on_cpu:
            return _read_cpu(device)
        if device.is_mps:
            return _read_torch(device, "macOS does not tell utilisation, temperature and power")
        if device.is_amd:
            return read_amd(device.name, _pci_address(device))
        if self._nvml is None and self._nvml_missing is None:
            self._nvml, self._nvml_missing = open_nvml()
        if self._nvml is None:
            return _read_torch(device, self._nvml_missing or "")
        return _read_nvml(self._nvml, device)


def _read_cpu(device: Device) -> DeviceReading:
    memory = psutil.virtual_memory()
    return DeviceReading(
        device=device.name,
        total_bytes=memory.total,
        used_bytes=memory.total - memory.available,
        utilization=psutil.cpu_percent(interval=None) / 100,
        temperature_c=_cpu_temperature(),
        unavailable="power is not read on a CPU",
    )


def _cpu_temperature() -> float | None:
    """The hottest of the processor's own sensors; virtual machines have none."""
    sensors = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
    values = [each.current for name in ("coretemp", "k10temp", "zenpower") for each in sensors.get(name, ())]
    return max(values, default=None)


def _read_torch(device: Device, reason: str) -> DeviceReading:
    free, total = torch_memory(device)
    return DeviceReading(device.name, total_bytes=total, used_bytes=total - free, unavailable=reason)


def open_nvml() -> tuple[ModuleType | None, str | None]:
    """NVML's module with a session open, or the reason there is none."""
    try:
        import pynvml
    except ImportError:
        return None, "the package nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return None, f"NVML: {error}"
    return pynvml, None


def _read_nvml(nvml: ModuleType, device: Device) -> DeviceReading:
    missing: list[str] = []

    def ask(what: str, function: str, *arguments: Any) -> Any:
        try:
            return getattr(nvml, function)(*arguments)
        except nvml.NVMLError as error:
            missing.append(f"{what}: {error}")
            return None

    handle = ask("card", "nvmlDeviceGetHandleByUUID", _nvml_uuid(device))
    if handle is None:
        return _read_torch(device, "; ".join(missing))
    memory = ask("memory", "nvmlDeviceGetMemoryInfo", handle)
    rates = ask("utilisation", "nvmlDeviceGetUtilizationRates", handle)
    temperature = ask("temperature", "nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU)
    milliwatts = ask("power", "nvmlDeviceGetPowerUsage", handle)
    limit = ask("power limit", "nvmlDeviceGetEnforcedPowerLimit", handle)
    generation = ask("PCIe generation", "nvmlDeviceGetCurrPcieLinkGeneration", handle)
    width = ask("PCIe width", "nvmlDeviceGetCurrPcieLinkWidth", handle)
    reasons = ask("throttling", "nvmlDeviceGetCurrentClocksThrottleReasons", handle)
    processes = ask("other processes", "nvmlDeviceGetComputeRunningProcesses", handle)
    return DeviceReading(
        device=device.name,
        total_bytes=None if memory is None else int(memory.total),
        used_bytes=None if memory is None else int(memory.used),
        utilization=None if rates is None else rates.gpu / 100,
        temperature_c=None if temperature is None else float(temperature),
        power_w=None if milliwatts is None else milliwatts / 1000,
        power_limit_w=None if limit is None else limit / 1000,
        pcie_generation=generation,
        pcie_width=width,
        throttling=None if reasons is None else tuple(name for bit, name in _THROTTLING.items() if reasons & bit),
        other_bytes=_of_others(processes),
        unavailable="; ".join(missing) or None,
    )


def _of_others(processes: Any) -> int | None:
    """What other processes hold. Not known in containers, where NVML numbers processes otherwise, or hides them."""
    if processes is None or all(process.pid != os.getpid() for process in processes):
        return None
    held = [process.usedGpuMemory for process in processes if process.pid != os.getpid()]
    return None if any(nbytes is None for nbytes in held) else sum(held)


def _pci_address(device: Device) -> str:
    """As /sys writes it."""
    import torch

    card: Any = torch.cuda.get_device_properties(device.torch_device)
    return f"{card.pci_domain_id:04x}:{card.pci_bus_id:02x}:{card.pci_device_id:02x}.0"


def _nvml_uuid(device: Device) -> str:
    """NVML numbers all cards, torch those that CUDA_VISIBLE_DEVICES shows; the UUID is the same for both."""
    import torch

    uuid = str(torch.cuda.get_device_properties(device.torch_device).uuid)
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
