"""`vramancer doctor`: what it measures, prints and warns of."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_settings import CACHE_DIR
from rich.console import Console
from typer.testing import CliRunner

from core.config import iter_settings
from core.costs import DeviceProfile, Sharing
from core.devices import Device, Machine
from core.devices.probe import MemoryNow, PhysicalDevice
from core.devices.readers import DeviceReading
from core.profiling import diagnosis, noise
from core.profiling.diagnosis import (
    Datasheet,
    DeviceDiagnosis,
    Diagnosis,
    LinkDiagnosis,
    compute_bound_streams,
    format_rate,
)
from core.profiling.profiler import LayerProfiler
from vramancer.cli import app
from vramancer.cli.doctor import print_diagnosis

GIB = 1024**3


def busy_reader(busy: Callable[[], float]) -> type[Any]:
    """Stands for `DeviceReader`: tests run beside others, whose work would be noise."""

    class Reader:
        def read(self, devices: Any) -> list[DeviceReading]:
            return [DeviceReading(device.name, utilization=busy()) for device in devices]

        def close(self) -> None:
            pass

    return Reader


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for info in iter_settings():
        monkeypatch.delenv(info.env, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(noise, "_LOOK_S", 0.0)
    monkeypatch.setattr(noise, "DeviceReader", busy_reader(lambda: 0.0))
    (CACHE_DIR / "kernels").mkdir(parents=True, exist_ok=True, mode=0o700)
    (tmp_path / "kernels").symlink_to(CACHE_DIR / "kernels", target_is_directory=True)


def doctor(tmp_path: Path, *arguments: str, devices: str = "cpu=1GiB,cpu=1GiB") -> Any:
    flags = ["--devices", devices, "--cache-dir", str(tmp_path), "--log-level", "error", "--seconds", "0.01"]
    return CliRunner().invoke(app, ["doctor", *flags, *arguments], env={"COLUMNS": "200"})


def _names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def test_json_has_the_documented_keys(tmp_path: Path) -> None:
    result = doctor(tmp_path, "--json", devices="cpu=1GiB,cpu=1GiB,sim=24GiB@936GB/s/71TFLOPS")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found) == _names(Diagnosis)
    assert (found["model"], found["dtype"]) == ("vramancer-demo", "float32")
    assert [device["name"] for device in found["devices"]] == ["cpu#0", "cpu#1", "sim"]
    for device in found["devices"]:
        assert set(device) == _names(DeviceDiagnosis)
        assert set(device["flops"]) == {"1", "16", "256"}
        assert all(rate > 0 for rate in device["flops"].values())
        assert device["bandwidth_bytes_s"] > 0 and device["total_bytes"] >= device["free_bytes"] > 0
        assert device["limits"].startswith(device["name"]) and device["datasheet"] is None
    measured, emulated = found["devices"][0], found["devices"][2]
    assert measured["source"] == "measured" and measured["limit_bytes"] == GIB and measured["step_overhead_s"] > 0
    assert measured["sharing"]["parts"] == 2 and measured["sharing"]["reading"] >= 1 and emulated["sharing"] is None
    assert (emulated["source"], emulated["bandwidth_bytes_s"], emulated["flops"]["16"]) == ("emulated", 936e9, 71e12)
    assert len(found["links"]) == 6
    for link in found["links"]:
        assert set(link) == _names(LinkDiagnosis)
        assert link["bandwidth_bytes_s"] > 0 and link["latency_s"] >= 0 and link["method"] == "copy"
    again = json.loads(doctor(tmp_path, "--json", devices="cpu=1GiB").stdout)
    assert again["devices"][0]["bandwidth_bytes_s"] == measured["bandwidth_bytes_s"], "measured once"
    refreshed = json.loads(doctor(tmp_path, "--json", "--refresh", devices="cpu=1GiB").stdout)
    assert refreshed["devices"][0]["bandwidth_bytes_s"] != measured["bandwidth_bytes_s"]


def test_tables(tmp_path: Path) -> None:
    result = doctor(tmp_path, "--no-native-kernels", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    for part in ("vramancer-demo in bfloat16", "cpu#0", "rate, 256 rows", "Links", "cpu#1 is limited by"):
        assert part in result.stdout
    assert "computes without the native kernels" in result.stdout and "native_kernels is off" in result.stdout


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    result = doctor(tmp_path, "--model", "./no/such/model")
    assert result.exit_code == 1
    assert "no/such/model" in result.output


def test_a_card_beside_its_datasheet() -> None:
    sheet = Datasheet("RTX 3090", 936e9, 71e12, 0.875, 0.5)
    card = DeviceDiagnosis(
        "cuda:0", "cuda", "NVIDIA GeForce RTX 3090", 24 * GIB, 20 * GIB, 18 * GIB, "triton", "measured", 819e9, 655e9,
        {"1": 8.1e11, "16": 1.2e13, "256": 3.55e13}, 4e-5, 3e-6, 2e-4, None, 80, "cuda:0 is limited by this and that.",
        sheet,
    )  # fmt: skip
    links = (LinkDiagnosis("cuda:0", "cuda:1", "staged", "measured", 3.1e-5, 11.6e9),)
    console = Console(file=io.StringIO(), width=200)
    print_diagnosis(Diagnosis("tiny", "bfloat16", "2.13", 8, (card,), links, ("one [thing] is wrong",)), console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for part in (
        "NVIDIA GeForce RTX 3090 (cuda)", "819 GB/s (88% of the datasheet's)", "35.5 TFLOP/s (50% of the datasheet's)",
        "810 GFLOP/s", "655 GB/s",
        "staged through the host", "31 us", "11.6 GB/s", "cuda:0 is limited by this", "one [thing]",
    ):  # fmt: skip
        assert part in text, part
    assert "beside other parts" not in text
    print_diagnosis(
        Diagnosis(
            "t", "bfloat16", "2", 8, (dataclasses.replace(card, sharing=Sharing("cuda:0", 2, 1.8, 2.0)),), (), ()
        ),
        console,
    )
    assert "reading 1.80, computing 2.00 times as long" in console.file.getvalue()


@pytest.mark.parametrize(
    ("product", "total", "card", "promised"),
    [
        ("NVIDIA GeForce RTX 3090", 23.7, "RTX 3090", 936e9),
        ("NVIDIA GeForce RTX 3080", 11.8, "RTX 3080 12GB", 912e9),
        ("NVIDIA GeForce RTX 3080", 9.8, "RTX 3080 10GB", 760e9),
        ("AMD Radeon RX 7900 XTX", 24.0, "RX 7900 XTX", 960e9),
        ("Somebody's first card", 1.0, None, None),
    ],
)
def test_shares_of_what_the_maker_says(
    monkeypatch: pytest.MonkeyPatch, product: str, total: float, card: str | None, promised: float | None
) -> None:
    monkeypatch.setattr(diagnosis, "device_facts", lambda device, threads: {"product": product})
    device = Device("cuda:0", 0, "cuda", "cuda:0", GIB)
    memory = MemoryNow("cuda:0", product, int(total * GIB), GIB, GIB)
    profile = DeviceProfile("cuda:0", 468e9, ((1, 4e11), (256, 3e13), (512, 2.9e13)))
    for dtype in (torch.bfloat16, torch.float32):
        sheet = diagnosis.diagnose_device(device, memory, profile, "triton", dtype, 8).datasheet
        if card is None or promised is None:
            assert sheet is None
            continue
        assert sheet is not None and (sheet.card, sheet.bandwidth_bytes_s) == (card, promised)
        assert sheet.bandwidth_share == pytest.approx(468e9 / promised)
        assert sheet.flops_share == (pytest.approx(3e13 / sheet.flops) if dtype is torch.bfloat16 else None)


def test_what_limits_in_a_sentence() -> None:
    device = Device("cuda:0", 0, "sim", "cpu", GIB)
    memory = MemoryNow("cuda:0", "card", GIB, GIB, GIB)

    def limits(*flops: tuple[int, float]) -> str:
        profile = DeviceProfile("cuda:0", 1e12, flops)
        return diagnosis.diagnose_device(device, memory, profile, "native", torch.bfloat16, 8).limits

    text = limits((1, 9e11), (512, 5e14))
    assert text.startswith("cuda:0 is limited by memory bandwidth (1 TB/s)") and "500 TFLOP/s at most" in text
    assert "what each call costs (so small, weights are read at 1 GB/s)" in limits((1, 1e9), (512, 5e14))
    assert limits((1, 9e11), (512, 1e18)).endswith("however many streams there are.")


def test_from_which_streams_on_computing_is_the_limit() -> None:
    roofline = DeviceProfile("card", 1e12, ((1, 1e14),))
    assert compute_bound_streams(roofline, 2) == 126, "a quarter more than the 100 of the roofline's ridge"
    assert compute_bound_streams(DeviceProfile("slow", 1e9, ((1, 1e18),)), 2) is None
    calls = DeviceProfile("calls cost more than reading", 1e12, ((1, 1e9), (64, 6.4e10)))
    assert compute_bound_streams(calls, 2) == 81
    assert [format_rate(rate, "B") for rate in (14.4e9, 7.1e13, 2.5e6)] == ["14.4 GB/s", "71 TB/s", "2.5 MB/s"]


def test_warnings_of_memory_and_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Swap:
        used = 3 * GIB

    def warnings(free: int, devices: str) -> str:
        processor = PhysicalDevice("cpu", "cpu", "cpu", "CPU", 16 * GIB, free)
        monkeypatch.setattr(diagnosis, "probe_machine", lambda: Machine((), processor, ("none is visible",)))
        result = doctor(tmp_path, "--json", devices=devices)
        assert result.exit_code == 0, result.output
        return "\n".join(json.loads(result.stdout)["warnings"])

    monkeypatch.setattr(diagnosis.psutil, "swap_memory", Swap)
    text = warnings(GIB, "cpu=1GiB,cpu=512MiB")
    for part in ("No GPU: none is visible", "3 GiB of swap"):
        assert part in text
    assert "cpu#0, cpu#1 may use 1.5 GiB, but only 1 GiB of 16 GiB are free now" in text
    assert "only 1 GiB of 16 GiB are free; other processes hold the rest" in warnings(GIB, "cpu=512MiB")
    assert "free" not in warnings(8 * GIB, "cpu=512MiB")


def test_the_warning_stays_with_the_measurement_until_it_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = 0.8

    monkeypatch.setattr(noise, "DeviceReader", busy_reader(lambda: busy))
    measured = []
    measure = LayerProfiler._measure_device
    monkeypatch.setattr(
        LayerProfiler, "_measure_device", lambda *given: measured.append(given[1].name) or measure(*given)
    )

    def warned() -> bool:
        result = doctor(tmp_path, "--json", devices="cpu=512MiB")
        assert result.exit_code == 0, result.output
        text = "\n".join(json.loads(result.stdout)["warnings"])
        return "cpu was busy with other work (80% of the time) when it was measured" in text

    assert warned() and measured == ["cpu"]
    assert warned() and measured == ["cpu"], "it is still busy: measuring again brings nothing"
    busy = 0.1
    assert not warned() and measured == ["cpu"] * 2
    busy = 0.8
    assert not warned() and measured == ["cpu"] * 2, "what was measured in quiet is kept"


def test_cards_that_are_left_out_are_told_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = PhysicalDevice("cpu", "cpu", "cpu", "CPU", 16 * GIB, 8 * GIB)
    old = PhysicalDevice("cuda:0", "cuda", "cuda:0", "Tesla K80", GIB, GIB, 0, "no kernels for it", is_usable=False)
    monkeypatch.setattr(diagnosis, "probe_machine", lambda: Machine((old,), processor))
    result = doctor(tmp_path, "--json", devices="cpu=512MiB")
    assert result.exit_code == 0, result.output
    assert "cuda:0 (Tesla K80) is left out: no kernels for it." in json.loads(result.stdout)["warnings"]
