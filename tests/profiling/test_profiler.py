"""Profiling: real, very short measurements on logical CPU devices, and when they are not repeated."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from plain_settings import CACHE_DIR, make_settings
from tiny_models import build_tiny

from core.config import DeviceSettings
from core.costs import DeviceProfile, LinkTopology, Sharing
from core.devices import Device, Machine, open_devices
from core.devices.device import DeviceSpeed
from core.devices.probe import PhysicalDevice, free_bytes_of, read_memory
from core.errors import OutOfDeviceMemoryError
from core.execution.attention.select import select_attention
from core.models.architecture import Architecture, read_architecture
from core.models.stage_model import PassThrough, measure_bytes
from core.profiling import measure
from core.profiling.device_speed import ROUNDS, ROWS, layer_shape
from core.profiling.layer_times import OVERHEAD_ROWS
from core.profiling.profiler import LayerProfiler
from core.profiling.random_layers import KV_ROWS, SHORT, RandomLayers, choose_layer_count
from core.transfer import TransferManager

GIB = 1024**3
PER_ROUND = 1 + len(ROWS) + len(OVERHEAD_ROWS) + 2
PER_DEVICE = ROUNDS * PER_ROUND
"""What is timed of a device in every round: reading, products, layers, long contexts, and a step without layers."""
CPU = Device("cpu", 0, "cpu", "cpu", GIB)
SIM = Device("sim", 0, "sim", "cpu", GIB, DeviceSpeed(936e9, 71e12))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    directory = tmp_path_factory.mktemp("llama")
    build_tiny("llama", directory)
    return read_architecture(directory)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """An empty cache, but for the kernels that are built already."""
    (CACHE_DIR / "kernels").mkdir(parents=True, exist_ok=True, mode=0o700)
    (tmp_path / "kernels").symlink_to(CACHE_DIR / "kernels", target_is_directory=True)
    return tmp_path


class Timings:
    """Counts what is timed, for real."""

    def __init__(self, real: Callable[..., float]) -> None:
        self.real, self.count = real, 0

    def __call__(self, *arguments: Any) -> float:
        self.count += 1
        return self.real(*arguments)


@pytest.fixture
def timings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Timings]:
    counter = Timings(measure.time_runs)
    monkeypatch.setattr(measure, "time_runs", counter)
    monkeypatch.setattr(measure, "cold_bytes", lambda device: 1024 * 1024)  # quick to fill; speeds do not matter here
    return counter


def profiler(cache: Path, **overrides: object) -> LayerProfiler:
    settings = make_settings(runtime__cache_dir=cache, **overrides)
    return LayerProfiler(settings, TransferManager(), 1, budget_s=0.01)


def assert_sound(profile: DeviceProfile) -> None:
    assert math.isfinite(profile.bandwidth_bytes_s) and profile.bandwidth_bytes_s > 0
    assert tuple(rows for rows, _ in profile.flops) == ROWS
    assert all(math.isfinite(rate) and rate > 0 for _, rate in profile.flops)
    assert 0 <= profile.layer_overhead_s < 600 and 0 < profile.step_overhead_s < 600
    assert 0 <= profile.row_overhead_s < 10
    assert profile.source == "measured"


def test_devices_and_links_are_measured_once(cache: Path, timings: Timings, llama: Architecture) -> None:
    devices = open_devices(DeviceSettings(devices="cpu=1GiB,cpu=1GiB"))
    threads = torch.get_num_threads()
    first, second = profiler(cache).devices(devices, llama)
    assert (first.name, second.name) == ("cpu#0", "cpu#1")
    assert_sound(first)
    assert replace(second, name=first.name) == first, "parts of one device share a measurement"
    assert timings.count == PER_DEVICE
    assert first.sharing is not None and first.sharing.parts == 2 and first.sharing.processor == "cpu"
    assert first.sharing.reading >= 1 and first.sharing.computing >= 1
    assert torch.get_num_threads() == threads

    links = profiler(cache).links(devices)
    assert set(links.links) == {("cpu#0", "cpu#1"), ("cpu#1", "cpu#0")}
    link = links.link("cpu#0", "cpu#1")
    assert math.isfinite(link.bandwidth_bytes_s) and link.bandwidth_bytes_s > 0 and 0 <= link.latency_s < 10
    assert (link.method, link.source) == ("copy", "measured")

    timings.count = 0
    assert profiler(cache).devices(devices, llama) == (first, second)
    assert profiler(cache).links(devices) == LinkTopology(links.links)
    assert timings.count == 0


def test_refresh_measures_what_is_known(cache: Path, timings: Timings, llama: Architecture) -> None:
    devices = open_devices(DeviceSettings(devices="cpu=1GiB,cpu=1GiB"))
    for _ in range(2):
        timings.count = 0
        profiler(cache).devices(devices, llama, refresh=True)
        assert timings.count == PER_DEVICE
        timings.count = 0
        profiler(cache).links(devices, refresh=True)
        assert timings.count == 2


def test_another_dtype_or_shape_is_measured(cache: Path, timings: Timings, llama: Architecture, tmp_path: Path) -> None:
    profiler(cache).devices([CPU], llama)
    build_tiny("qwen3", tmp_path / "qwen3")
    others = [replace(llama, dtype=torch.bfloat16), read_architecture(tmp_path / "qwen3")]
    for other in others:
        timings.count = 0
        assert_sound(profiler(cache).devices([CPU], other)[0])
        assert timings.count > 0
    timings.count = 0
    profiler(cache, engine__native_kernels=False).devices([CPU], llama)
    LayerProfiler(make_settings(runtime__cache_dir=cache), TransferManager(), 2, budget_s=0.01).devices([CPU], llama)
    assert timings.count == 2 * PER_DEVICE, "without native kernels, and with other threads"
    assert len(list((cache / "profiles").glob("device-*"))) == 5


def test_other_kernels_are_measured(
    cache: Path, timings: Timings, llama: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    profiler(cache).devices([CPU], llama)
    timings.count = 0
    monkeypatch.setattr("core.profiling.profiler.kernel_digest", lambda: "edited")
    profiler(cache).devices([CPU], llama)
    assert timings.count == PER_DEVICE


def test_a_damaged_file_is_measured_again(cache: Path, timings: Timings, llama: Architecture) -> None:
    profiler(cache).devices([CPU], llama)
    (path,) = (cache / "profiles").glob("device-*")
    path.write_text(path.read_text()[:-20])
    timings.count = 0
    (profile,) = profiler(cache).devices([CPU], llama)
    assert timings.count > 0
    assert json.loads(path.read_text())["bandwidth_bytes_s"] == profile.bandwidth_bytes_s


def test_emulated_devices_have_the_speed_they_were_given(cache: Path, timings: Timings, llama: Architecture) -> None:
    (profile,) = profiler(cache).devices([SIM], llama)
    assert profile == DeviceProfile("sim", 936e9, ((1, 71e12),), 0.0, 0.0, "emulated")
    links = profiler(cache, devices__sim_link="11.6GB/s@30us").links([SIM, CPU])
    for pair in (("sim", "cpu"), ("cpu", "sim")):
        link = links.link(*pair)
        assert (link.bandwidth_bytes_s, link.source) == (11.6e9, "emulated")
        assert link.latency_s == pytest.approx(30e-6)
    assert timings.count == 0 and not (cache / "profiles").exists()


def test_what_parts_cost_each_other_is_measured_once(
    cache: Path, timings: Timings, llama: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    del timings
    asked: list[int] = []

    def factors(parts: list[RandomLayers], prepare: object, overlap: object, budget_s: float) -> tuple[float, float]:
        asked.append(len(parts))
        return 1.5, 1.25

    monkeypatch.setattr("core.profiling.profiler.measure_sharing", factors)
    two = open_devices(DeviceSettings(devices="cpu=1GiB,cpu=1GiB"))
    for _ in range(2):
        profiles = profiler(cache).devices([*two, SIM], llama)
        assert [profile.sharing for profile in profiles] == [Sharing("cpu", 2, 1.5, 1.25)] * 2 + [None]
    assert asked == [2]
    (alone,) = profiler(cache).devices(two[:1], llama)
    assert alone == replace(profiles[0], sharing=None)
    profiler(cache).devices(open_devices(DeviceSettings(devices="cpu=1GiB,cpu=1GiB,cpu=1GiB")), llama)
    profiler(cache).devices(two, llama, refresh=True)
    assert asked == [2, 3, 2]


def test_parts_without_room_for_a_layer_each(cache: Path, timings: Timings, llama: Architecture) -> None:
    del timings
    small = [replace(CPU, name=f"cpu#{index}", memory_limit_bytes=20_000) for index in range(2)]
    assert [profile.sharing for profile in profiler(cache).devices(small, llama)] == [None, None]


def test_a_device_without_room_for_a_layer(cache: Path, timings: Timings, llama: Architecture) -> None:
    (profile,) = profiler(cache).devices([replace(CPU, memory_limit_bytes=20_000)], llama)
    assert profile.bandwidth_bytes_s > 0
    assert (profile.layer_overhead_s, profile.step_overhead_s) == (0.0, 0.0)
    with pytest.raises(OutOfDeviceMemoryError, match="too little to measure"):
        profiler(cache).devices([replace(CPU, memory_limit_bytes=200)], llama, refresh=True)


@pytest.mark.usefixtures("timings")
def test_memory_that_runs_out_is_a_typed_error(
    cache: Path, monkeypatch: pytest.MonkeyPatch, llama: Architecture
) -> None:
    def fail(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(measure.Products, "reading", fail)
    with pytest.raises(OutOfDeviceMemoryError, match=r"cpu: .* CUDA out of memory\.$"):
        profiler(cache).devices([CPU], llama)


def test_attention_to_kv_and_tokens_are_measured_on_layers(
    cache: Path, monkeypatch: pytest.MonkeyPatch, llama: Architecture
) -> None:
    """Time by a formula in place of a clock: what the formula is made of is found again."""
    monkeypatch.setattr(measure, "cold_bytes", lambda device: 1024 * 1024)
    token = 2 * 2 * 8 * 4
    layer_bytes = max(measure_bytes(llama).layers)

    def seconds(work: Any, device: torch.device, budget_s: float) -> float:
        step = getattr(work, "__self__", None)
        if not isinstance(step, RandomLayers):
            return 1e-12  # products take no time: nothing but overhead and KV remains
        if isinstance(step._layers[step._part.first], PassThrough):
            return 1e-4
        metadata = step._context.metadata
        assert metadata is not None
        rows, kv = len(metadata.host_seq_lens), sum(metadata.host_seq_lens) * token
        return 1e-4 + step.count * (layer_bytes * 1e-15 + 2e-4 + 3e-5 * rows + kv / 1e9)

    monkeypatch.setattr(measure, "time_runs", seconds)
    (profile,) = profiler(cache).devices([CPU], llama)
    assert profile.kv_bytes_s == pytest.approx(1e9, rel=1e-3)
    assert profile.layer_overhead_s == pytest.approx(2e-4, rel=1e-3)
    assert profile.row_overhead_s == pytest.approx(3e-5, rel=1e-3)
    assert profile.step_overhead_s == 1e-4


def test_a_disturbed_round_decides_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch, llama: Architecture) -> None:
    """Something else ran in the second round, and everything took ten times as long."""
    monkeypatch.setattr(measure, "cold_bytes", lambda device: 1024 * 1024)
    done = 0

    def seconds(work: Callable[[], object], device: torch.device, budget_s: float) -> float:
        nonlocal done
        done += 1
        return 1e-2 if PER_ROUND < done <= 2 * PER_ROUND else 1e-3

    monkeypatch.setattr(measure, "time_runs", seconds)
    (disturbed,) = profiler(cache).devices([CPU], llama)
    done = -1000
    (quiet,) = profiler(cache).devices([CPU], llama, refresh=True)
    assert disturbed == quiet


@pytest.mark.parametrize("name", ["gpt2", "opt", "granite", "gemma2", "phi3", "mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.usefixtures("timings")
def test_layers_of_many_architectures(name: str, cache: Path, tmp_path: Path) -> None:
    build_tiny(name, tmp_path / name)
    architecture = read_architecture(tmp_path / name)
    assert_sound(profiler(cache).devices([CPU], architecture)[0])


def with_layers(count: int, directory: Path) -> Architecture:
    """From a config alone: whoever only plans has no weights."""
    build_tiny("llama", directory)
    config = json.loads((directory / "config.json").read_text()) | {"num_hidden_layers": count}
    (directory / "config.json").write_text(json.dumps(config))
    for weights in directory.glob("*.safetensors"):
        weights.unlink()
    return read_architecture(directory)


@pytest.mark.parametrize("count", [1, 2])
def test_models_of_few_layers(count: int, cache: Path, tmp_path: Path) -> None:
    architecture = with_layers(count, tmp_path / "model")
    assert choose_layer_count(architecture, CPU, GIB, 64) == 1
    backend, adapt = select_attention(CPU, make_settings(runtime__cache_dir=cache), 1)
    layers = RandomLayers(architecture, CPU, 1, backend, adapt or (lambda model: None))
    with torch.inference_mode():
        for passing in (False, True, False):
            layers.pass_by(passing)
            layers.step()


def test_steps_with_long_contexts_stay_within_the_pages(cache: Path, llama: Architecture) -> None:
    """Also where tokens are not whole blocks for every sequence, and where there are none for a long context."""
    backend, adapt = select_attention(CPU, make_settings(runtime__cache_dir=cache), 1)
    far = replace(llama, max_position=4096)
    for tokens in (KV_ROWS * 101 + 3, KV_ROWS * 64 + 7, 32 * SHORT):
        layers = RandomLayers(far, CPU, 1, backend, adapt or (lambda model: None), tokens)
        assert KV_ROWS * -(-layers.long // 16) <= -(-tokens // 16)
        layers.set_step(KV_ROWS, layers.long)
        with torch.inference_mode():
            layers.step()
        with pytest.raises(ValueError, match="pages"):
            layers.set_step(KV_ROWS, tokens // KV_ROWS + 32)


def test_the_number_of_layers(monkeypatch: pytest.MonkeyPatch, llama: Architecture, tmp_path: Path) -> None:
    layer, token = max(measure_bytes(llama).layers), 2 * 2 * 8 * 4  # two KV heads of width 8, K and V, fp32
    large = with_layers(32, tmp_path / "model")
    monkeypatch.setattr(measure, "cold_bytes", lambda device: 5 * layer // 2)
    assert choose_layer_count(large, CPU, GIB, 64) == 3, "enough to be larger than the caches"
    assert choose_layer_count(large, CPU, 2 * (layer + 64 * token), 64) == 2, "no more than there is room for"
    assert choose_layer_count(large, CPU, 2 * (layer + 64 * token) - 1, 64) == 1
    assert choose_layer_count(large, CPU, layer + 64 * token - 1, 64) == 0, "KV counts"
    monkeypatch.setattr(measure, "cold_bytes", lambda device: GIB)
    assert choose_layer_count(large, CPU, GIB, 64) == 8
    assert choose_layer_count(llama, CPU, GIB, 64) == 2


def test_the_shape_is_that_of_the_layers(llama: Architecture, tmp_path: Path) -> None:
    assert layer_shape(llama) == {
        "model_type": "llama", "hidden": 32, "intermediate": 48, "heads": 4, "kv_heads": 2, "key_dim": 8, "value_dim": 8
    }  # fmt: skip
    build_tiny("mixtral", tmp_path / "experts")
    assert layer_shape(read_architecture(tmp_path / "experts"))["intermediate"] in (24, 48)
    build_tiny("opt", tmp_path / "opt")
    assert layer_shape(read_architecture(tmp_path / "opt"))["intermediate"] == 48


def test_free_memory_is_the_machines(llama: Architecture) -> None:
    card = PhysicalDevice("cuda:0", "cuda", "cuda:0", "Card", 24 * GIB, 3 * GIB)
    processor = PhysicalDevice("cpu", "cpu", "cpu", "CPU", 64 * GIB, 32 * GIB)
    parts = [Device("cuda:0#0", 0, "cuda", "cuda:0", 8 * GIB), Device("cuda:0#1", 1, "cuda", "cuda:0", 2 * GIB), SIM]
    first, second, emulated = read_memory(parts, Machine((card,), processor))
    assert (first.product, first.total_bytes, first.free_bytes, first.limit_bytes) == (
        "Card",
        24 * GIB,
        3 * GIB,
        8 * GIB,
    )
    assert (first.usable_bytes, second.usable_bytes, emulated.total_bytes) == (3 * GIB, 2 * GIB, 64 * GIB)
    (now,) = read_memory([CPU])
    assert 0 < now.free_bytes <= now.total_bytes


def test_free_memory_of_a_device_is_asked_of_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another card is not touched: that would take memory of it."""
    asked: list[str] = []

    def mem_get_info(device: str) -> tuple[int, int]:
        asked.append(device)
        return 3 * GIB, 24 * GIB

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("all cards are looked for"))
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 10 * GIB)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 4 * GIB)
    assert free_bytes_of(Device("cuda:1#0", 0, "cuda", "cuda:1", GIB)) == 3 * GIB
    assert free_bytes_of(Device("mps", 0, "mps", "mps", GIB)) == 6 * GIB
    assert 0 < free_bytes_of(CPU) <= psutil.virtual_memory().total
    assert free_bytes_of(SIM) > 0
    assert asked == ["cuda:1"]


# -- timing ---------------------------------------------------------------------------------------------------------


def _times(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> list[float]:
    left = list(values)
    monkeypatch.setattr(measure, "time_once", lambda work, device: left.pop(0))
    monkeypatch.setattr(measure, "_MOST_WARM_UP_S", 0.0)
    return left


def test_runs_that_agree_end_early(monkeypatch: pytest.MonkeyPatch) -> None:
    left = _times(monkeypatch, [9.0, 1.01, 5.0, 1.0, 0.2, 1.01, 1.015, 0.0])
    assert measure.time_runs(lambda: None, torch.device("cpu"), 1000.0) == 1.01, "the median"
    assert left == [0.0]


def test_without_a_budget_there_is_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    left = _times(monkeypatch, [9.0, 2.0, 0.0])
    assert measure.time_runs(lambda: None, torch.device("cpu"), 0.0) == 2.0
    assert left == [0.0]


def test_short_runs_are_timed_together() -> None:
    runs = 0

    def work() -> None:
        nonlocal runs
        runs += 1

    assert measure.time_runs(work, torch.device("cpu"), 0.0) > 0
    assert runs > 2


def test_a_card_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            happened.append(f"record on {stream}")

        def synchronize(self) -> None:
            happened.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 250.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: happened.append("idle"))
    assert measure.time_once(lambda: happened.append("work"), torch.device("cuda:1")) == 0.25
    assert happened == ["idle", "record on stream of cuda:1", "work", "record on stream of cuda:1", "wait"]


def test_what_is_larger_than_the_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mib = 1024 * 1024
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=200 * mib), raising=False
    )
    assert measure.cold_bytes(Device("cuda:0", 0, "cuda", "cuda:0", 1)) == 800 * mib
    assert measure.cold_bytes(Device("mps", 0, "mps", "mps", 1)) == 512 * mib
    for cpu, (shared, size) in enumerate((("0-1", "32768K"), ("0-1", "32768K"), ("2-3", "32M"))):
        for level, text, of in ((2, "512K", str(cpu)), (3, size, shared)):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{level}"
            folder.mkdir(parents=True)
            for name, value in (("level", str(level)), ("size", text), ("shared_cpu_list", of)):
                (folder / name).write_text(f"{value}\n")
    monkeypatch.setattr(measure, "_CPU_CACHES", tmp_path)
    assert measure.cold_bytes(CPU) == 4 * 64 * mib
    monkeypatch.setattr(measure, "_CPU_CACHES", tmp_path / "nowhere")
    assert measure.cold_bytes(CPU) == 64 * mib


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")
def test_a_card_and_its_links_are_measured(cache: Path, llama: Architecture) -> None:
    devices = [*open_devices(DeviceSettings()), CPU]
    for profile in profiler(cache).devices(devices, replace(llama, dtype=torch.bfloat16)):
        assert_sound(profile)
    links = profiler(cache).links(devices)
    assert all(link.bandwidth_bytes_s > 0 for link in links.links.values())
    assert len(links.links) == len(devices) * (len(devices) - 1)
