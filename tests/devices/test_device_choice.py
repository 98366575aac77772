"""Which devices are used, from what the machine has: pure, so any machine can be described."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from core.config import DeviceSettings
from core.devices import Machine, PhysicalDevice, choose_devices, discovery, open_devices, probe_machine
from core.errors import DeviceError

GIB = 1024**3
CPU = PhysicalDevice("cpu", "cpu", "cpu", "CPU and main memory", 32 * GIB, 20 * GIB)
BIG = PhysicalDevice("cuda:0", "cuda", "cuda:0", "RTX 3090", 24 * GIB, 22 * GIB)
SMALL = PhysicalDevice("cuda:1", "cuda", "cuda:1", "RTX 5070 Ti", 16 * GIB, 10 * GIB)
WITHOUT_GPU = Machine(gpus=(), cpu=CPU, missing=("no CUDA device: torch was built without CUDA",))
WITH_GPUS = Machine(gpus=(BIG, SMALL), cpu=CPU)


def names_and_limits(machine: Machine, *, allocate: bool = True, **settings: object) -> list[tuple[str, int]]:
    devices, _ = choose_devices(DeviceSettings.model_validate(settings), machine, allocate=allocate)
    assert [device.index for device in devices] == list(range(len(devices)))
    return [(device.name, device.memory_limit_bytes) for device in devices]


def refusal(machine: Machine, **settings: object) -> str:
    with pytest.raises(DeviceError) as caught:
        names_and_limits(machine, **settings)
    return caught.value.message


def test_every_gpu_is_used_with_a_share_of_its_free_memory() -> None:
    found = names_and_limits(WITH_GPUS, memory_fraction=0.5)
    assert found == [("cuda:0", 11 * GIB), ("cuda:1", 5 * GIB)]


def test_num_gpus_takes_the_first() -> None:
    assert [name for name, _ in names_and_limits(WITH_GPUS, num_gpus=1)] == ["cuda:0"]
    assert [name for name, _ in names_and_limits(WITHOUT_GPU, devices="cpu=1GiB,cpu=1GiB", num_gpus=1)] == ["cpu#0"]


def test_more_gpus_than_there_are_is_refused() -> None:
    assert "num_gpus is 3, but there are 2: cuda:0, cuda:1" in refusal(WITH_GPUS, num_gpus=3)
    assert "there is no GPU: no CUDA device: torch was built without CUDA" in refusal(WITHOUT_GPU, num_gpus=1)


def test_without_a_gpu_the_cpu_is_used_and_the_reason_given() -> None:
    devices, reason = choose_devices(DeviceSettings(memory_fraction=0.5), WITHOUT_GPU)
    assert [(device.name, device.memory_limit_bytes) for device in devices] == [("cpu", 10 * GIB)]
    assert reason == "no CUDA device: torch was built without CUDA; using cpu"


def test_a_carved_device_keeps_its_order_and_limits() -> None:
    found = names_and_limits(WITH_GPUS, devices="cuda:1=2GiB,cuda:0=20GiB,cuda:0=4GiB")
    assert found == [("cuda:1", 2 * GIB), ("cuda:0#0", 20 * GIB), ("cuda:0#1", 4 * GIB)]


def test_parts_may_not_exceed_the_device_together() -> None:
    message = refusal(WITH_GPUS, devices="cuda:0=20GiB,cuda:0=5GiB")
    assert "cuda:0#0 20 GiB + cuda:0#1 5 GiB = 25 GiB" in message and "24 GiB" in message and "RTX 3090" in message
    assert "more than" in refusal(WITH_GPUS, devices="cuda:1=17GiB")


def test_emulated_devices_take_main_memory() -> None:
    spec = "cpu=20GiB,sim=13GiB@936GB/s/71TFLOPS"
    assert "33 GiB" in refusal(WITHOUT_GPU, devices=spec)
    assert names_and_limits(WITHOUT_GPU, devices="cpu=19GiB,sim=13GiB@936GB/s/71TFLOPS") == [
        ("cpu", 19 * GIB),
        ("sim", 13 * GIB),
    ]


def test_a_plan_may_emulate_more_than_there_is() -> None:
    spec = "sim=48GiB@936GB/s/71TFLOPS"
    assert names_and_limits(WITHOUT_GPU, devices=spec, allocate=False) == [("sim", 48 * GIB)]
    with pytest.raises(DeviceError, match="more than"):
        names_and_limits(WITHOUT_GPU, devices="cpu=33GiB", allocate=False)


def test_a_missing_device_is_refused_with_what_there_is() -> None:
    message = refusal(WITHOUT_GPU, devices="cuda:0=1GiB")
    assert "cuda:0 is not there; this machine has cpu (no CUDA device" in message
    assert "cuda:0, cuda:1, cpu" in refusal(WITH_GPUS, devices="rocm:0")


def test_emulated_devices_compute_on_the_cpu() -> None:
    (device,), _ = choose_devices(DeviceSettings(devices="sim=1GiB@1GB/s/1TFLOPS"), WITH_GPUS)
    assert (device.kind, device.torch_device) == ("sim", "cpu")
    assert device.speed is not None and device.speed.bandwidth_bytes_s == 1e9


def test_this_machine() -> None:
    machine = probe_machine()
    assert 0 < machine.cpu.free_bytes <= machine.cpu.total_bytes
    assert machine.gpus or machine.missing
    (device,) = open_devices(DeviceSettings(devices="cpu"))
    assert 0 < device.memory_limit_bytes < machine.cpu.total_bytes


def test_the_choice_is_logged_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        open_devices(DeviceSettings(devices="cpu=1GiB"))
    assert "asked for" in caplog.text and "1 GiB" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")
def test_gpus_are_found() -> None:
    devices = open_devices(DeviceSettings())
    assert {device.kind for device in devices} <= {"cuda", "rocm", "mps"}
    assert all(device.memory_limit_bytes > 0 for device in devices)


@pytest.mark.parametrize(("text", "total"), [("1073741824\n", GIB), ("max\n", None), (None, None), (str(2**62), None)])
def test_a_containers_limit_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None, total: int | None
) -> None:
    path = tmp_path / "memory.max"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(discovery, "_CGROUP_LIMIT", path)
    cpu = probe_machine().cpu
    assert cpu.total_bytes == (total or psutil.virtual_memory().total)
    assert cpu.free_bytes <= cpu.total_bytes
