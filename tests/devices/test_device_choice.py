"""Which devices are used, from what the machine has: pure, so any machine can be described."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from core.config import DeviceSettings
from core.devices import Machine, open_devices, probe, probe_machine
from core.devices.discovery import choose_devices, grant_bytes
from core.devices.probe import PhysicalDevice
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
    message = refusal(WITH_GPUS, devices="cuda:0=20GiB,cuda:0=8GiB")
    assert "cuda:0#0 20 GiB + cuda:0#1 8 GiB = 28 GiB" in message and "24 GiB" in message and "RTX 3090" in message
    assert "more than" in refusal(WITH_GPUS, devices="cuda:1=18GiB")


@pytest.mark.parametrize(
    ("asked", "total", "free", "ours", "granted"),
    [
        ([24], 24, 10, 0, [24]),  # what is given counts, whoever uses the card now
        ([20, 4], 24, 24, 0, [20, 4]),
        ([24], 23.69, 23.25, 0, [23.25]),  # a 3090
        ([48], 44.99, 44.5, 0, [44.5]),  # an L40S with error correction
        ([24], 23.69, 3.25, 20, [23.25]),  # a swap: what this process holds of it counts
        ([24], 23.69, 8, 0, [8]),  # others hold the rest
        ([16, 8], 23.69, 22.5, 0, [15, 7.5]),
        ([24], 22.3, 22, 0, [22]),
        ([24], 22.2, 22, 0, None),
        ([13, 13], 24, 24, 0, None),
    ],
)
def test_the_size_a_card_is_sold_with_means_all_of_it(
    asked: list[float], total: float, free: float, ours: float, granted: list[float] | None
) -> None:
    card = PhysicalDevice("cuda:0", "cuda", "cuda:0", "card", int(total * GIB), int(free * GIB), int(ours * GIB))
    found = grant_bytes([int(size * GIB) for size in asked], card)
    assert found == (None if granted is None else pytest.approx([size * GIB for size in granted], abs=2))


def test_a_nominal_size_is_taken_and_said() -> None:
    card = replace(BIG, total_bytes=int(23.69 * GIB), free_bytes=23 * GIB)
    devices, reason = choose_devices(DeviceSettings(devices="cuda:0=24GiB"), Machine(gpus=(card,), cpu=CPU))
    assert [device.memory_limit_bytes for device in devices] == [23 * GIB]
    assert reason == "asked for; 24 GiB of cuda:0 (RTX 3090) are taken as all of it, 23 GiB"


def test_cards_with_a_drawback_are_used_only_if_they_are_named() -> None:
    old = replace(BIG, product="GT 710", drawback="no kernels for its compute capability 3.5", is_usable=False)
    inside = replace(SMALL, product="Radeon Graphics", drawback="it shares main memory")
    third = replace(SMALL, name="cuda:2", torch_device="cuda:2")
    machine = Machine(gpus=(old, inside, third), cpu=CPU)
    devices, reason = choose_devices(DeviceSettings(), machine)
    assert [device.name for device in devices] == ["cuda:2"]
    assert reason == (
        "found; cuda:0 (GT 710) is left out: no kernels for its compute capability 3.5; "
        "cuda:1 (Radeon Graphics) is left out: it shares main memory"
    )
    assert [name for name, _ in names_and_limits(machine, devices="cuda:1")] == ["cuda:1"]
    assert refusal(machine, devices="cuda:0") == (
        "cuda:0 (GT 710) cannot be used: no kernels for its compute capability 3.5."
    )
    alone = Machine(gpus=(old,), cpu=CPU)
    devices, reason = choose_devices(DeviceSettings(), alone)
    assert [device.name for device in devices] == ["cpu"] and "cuda:0 (GT 710) is left out" in reason
    assert "no GPU: cuda:0 (GT 710) is left out" in refusal(alone, num_gpus=1)


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
    monkeypatch.setattr(probe, "_CGROUP_LIMIT", path)
    cpu = probe_machine().cpu
    assert cpu.total_bytes == (total or psutil.virtual_memory().total)
    assert cpu.free_bytes <= cpu.total_bytes
