"""Snapshots of what devices are doing: memory, utilisation, temperature, power."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import psutil

from core.devices.device import Device
from core.devices.probe import torch_memory


@dataclass(frozen=True, slots=True)
class DeviceReading:
    """One device at one moment. Memory is the physical device's, with everybody's use of it.

    What could not be read is None, and `unavailable` says why.
    """

    device: str
    total_bytes: int | None = None
    used_bytes: int | None = None
    utilization: float | None = None  # share of time busy, 0 to 1
    temperature_c: float | None = None
    power_w: float | None = None
    unavailable: str | None = None


class DeviceReader:
    """Reads devices; thread-safe. NVML's session is opened for the first CUDA device, and ended by `close`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._nvml: ModuleType | None = None
        self._nvml_missing: str | None = None  # the reason, once it was tried
        psutil.cpu_percent(interval=None)  # the first call only starts the clock

    def read(self, devices: Iterable[Device]) -> list[DeviceReading]:
        """One reading per device, in their order."""
        with self._lock:
            return [self._read(device) for device in devices]

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
            return _read_torch(device, "utilisation, temperature and power are read on NVIDIA cards only")
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
        unavailable="temperature and power are not read on a CPU",
    )


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
    return DeviceReading(
        device=device.name,
        total_bytes=None if memory is None else int(memory.total),
        used_bytes=None if memory is None else int(memory.used),
        utilization=None if rates is None else rates.gpu / 100,
        temperature_c=None if temperature is None else float(temperature),
        power_w=None if milliwatts is None else milliwatts / 1000,
        unavailable="; ".join(missing) or None,
    )


def _nvml_uuid(device: Device) -> str:
    """NVML numbers all cards, torch those that CUDA_VISIBLE_DEVICES shows; the UUID is the same for both."""
    import torch

    uuid = str(torch.cuda.get_device_properties(device.torch_device).uuid)
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
