"""Readings of devices: the CPU for real; NVML through a small fake, since few machines have a card."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import psutil
import pytest
import torch

from core.config import DeviceSettings
from core.devices import Device, DeviceReader, open_devices, readers

CPU = Device("cpu#0", 0, "cpu", "cpu", 1024)
CUDA = Device("cuda:0", 0, "cuda", "cuda:0", 1024)


class FakeNvml(ModuleType):
    """One card, whose power cannot be read."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def __init__(self, *, opens: bool = True) -> None:
        super().__init__("pynvml")
        self.opens, self.sessions = opens, 0
        self.processes: dict[int, int | None] = {os.getpid(): 5_000, 1: 400, 2: 600}

    def nvmlInit(self) -> None:
        if not self.opens:
            raise self.NVMLError("driver not loaded")
        self.sessions += 1

    def nvmlShutdown(self) -> None:
        self.sessions -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        assert handle == "GPU-1234"
        return SimpleNamespace(total=24_000, used=6_000)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(gpu=75)

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 61

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        raise self.NVMLError("Not Supported")

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return 350_000

    def nvmlDeviceGetCurrPcieLinkGeneration(self, handle: str) -> int:
        return 4

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle: str) -> int:
        return 8

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return 0x1 | 0x4 | 0x40

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=nbytes) for pid, nbytes in self.processes.items()]


@pytest.fixture
def fake_torch_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 40))
    return


def test_a_cpu_is_read() -> None:
    (reading,) = DeviceReader().read([CPU])
    assert reading.device == "cpu#0"
    assert reading.total_bytes == psutil.virtual_memory().total
    assert reading.used_bytes is not None and 0 < reading.used_bytes < reading.total_bytes
    assert reading.utilization is not None and 0 <= reading.utilization <= 1
    assert reading.power_w is None and reading.unavailable


def test_every_device_is_read_in_order() -> None:
    other = Device("sim", 1, "sim", "cpu", 1024)
    assert [reading.device for reading in DeviceReader().read([CPU, other])] == ["cpu#0", "sim"]


@pytest.mark.usefixtures("fake_torch_cuda")
def test_an_nvidia_card_is_found_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    reader = DeviceReader()
    (reading,) = reader.read([CUDA])
    assert reader.read([CUDA]) == [reading]
    assert (reading.total_bytes, reading.used_bytes) == (24_000, 6_000)
    assert (reading.utilization, reading.temperature_c, reading.power_w) == (0.75, 61.0, None)
    assert (reading.power_limit_w, reading.pcie_generation, reading.pcie_width) == (350.0, 4, 8)
    assert reading.throttling == ("power limit", "temperature (hardware)")
    assert reading.other_bytes == 1_000
    assert reading.unavailable == "power: Not Supported"
    assert nvml.sessions == 1
    reader.close()
    reader.close()
    assert nvml.sessions == 0


@pytest.mark.usefixtures("fake_torch_cuda")
@pytest.mark.parametrize("processes", [{}, {1: 400}, {os.getpid(): 5_000, 1: None}])
def test_what_others_hold_is_not_guessed(monkeypatch: pytest.MonkeyPatch, processes: dict[int, int | None]) -> None:
    """In a container NVML tells other process ids than the process's own, or none; some drivers tell no sizes."""
    nvml = FakeNvml()
    nvml.processes = processes
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    (reading,) = DeviceReader().read([CUDA])
    assert reading.other_bytes is None


@pytest.mark.usefixtures("fake_torch_cuda")
def test_parts_of_one_card_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    asked: list[str] = []
    monkeypatch.setattr(
        nvml, "nvmlDeviceGetUtilizationRates", lambda handle: asked.append(handle) or SimpleNamespace(gpu=75)
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    parts = [replace(CUDA, name=f"cuda:0#{number}", index=number) for number in range(2)]
    readings = DeviceReader().read([*parts, CPU])
    assert [reading.device for reading in readings] == ["cuda:0#0", "cuda:0#1", "cpu#0"]
    assert [reading.utilization for reading in readings[:2]] == [0.75, 0.75]
    assert asked == ["GPU-1234"]


@pytest.mark.usefixtures("fake_torch_cuda")
@pytest.mark.parametrize(
    ("nvml", "reason"),
    [(None, "nvidia-ml-py is not installed"), (FakeNvml(opens=False), "NVML: driver not loaded")],
)
def test_without_nvml_memory_comes_from_torch(
    monkeypatch: pytest.MonkeyPatch, nvml: ModuleType | None, reason: str
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    (reading,) = DeviceReader().read([CUDA])
    assert (reading.total_bytes, reading.used_bytes, reading.utilization) == (40, 30, None)
    assert reading.unavailable is not None and reason in reading.unavailable


def test_nvml_is_not_touched_without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "open_nvml", lambda: pytest.fail("opened"))
    DeviceReader().read([CPU])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")
def test_a_real_card_is_read() -> None:
    devices = open_devices(DeviceSettings())
    reader = DeviceReader()
    try:
        for reading in reader.read(devices):
            assert reading.total_bytes and reading.used_bytes and reading.used_bytes <= reading.total_bytes
    finally:
        reader.close()
