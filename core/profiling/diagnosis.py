"""What `vramancer doctor` tells: devices and links as measured, what limits them, and what is not as it should be."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil
import torch

from core.config import Settings
from core.costs import DeviceProfile, Sharing
from core.costs.cards import card
from core.devices import Device, format_bytes, left_out, open_devices, probe_machine
from core.devices.probe import MemoryNow, read_memory
from core.errors import DeviceError
from core.execution.attention.select import select_attention
from core.execution.attention.triton_probe import probe_triton
from core.execution.native.build import find_compilers
from core.models.dtype import served_architecture
from core.models.resolve import resolve_model
from core.profiling.noise import Noise
from core.profiling.profile_store import device_facts
from core.profiling.profiler import DEVICE_BUDGET_S, LayerProfiler
from core.quantization.choice import QuantizeChoice
from core.transfer import TransferManager

SHOWN_ROWS = (1, 16, 256)
"""Rows of a matrix product whose rates are told."""

_MOST_STREAMS = 4096
_CLEARLY = 1.25  # how much longer than for one stream a step has to take before computing is what limits it
_CALLS = 2.0  # how much slower than memory weights have to be read before calls are what limits it
_LOW_SHARE = 0.1
_SWAP_BYTES = 64 * 1024 * 1024
_GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Datasheet:
    """What the maker says of a card, and which share of it was reached (1: all of it).

    `flops` is the matrix rate of bf16 and fp16; in fp32 `flops_share` is None.
    """

    card: str
    bandwidth_bytes_s: float
    flops: float
    bandwidth_share: float
    flops_share: float | None


@dataclass(frozen=True, slots=True)
class DeviceDiagnosis:
    """One logical device; speeds and overheads are its profile's (`core.costs.DeviceProfile`).

    Attributes:
        product: the device whose memory it has.
        total_bytes, free_bytes: of the physical device now, other processes' use included.
        limit_bytes: what a plan may use.
        attention: the attention backend it gets; "native" comes with the compiled linear layers.
        flops: operations per second by rows of the matrix product ("1", "16", "256").
        compute_bound_streams: from how many streams on a step takes longer than for one, because computing takes longer
            than reading the weights; None: not up to thousands.
        limits: the same in a sentence.
        datasheet: None for devices that are in no table.
    """

    name: str
    kind: str
    product: str
    total_bytes: int
    free_bytes: int
    limit_bytes: int
    attention: str
    source: str
    bandwidth_bytes_s: float
    kv_bandwidth_bytes_s: float
    flops: dict[str, float]
    layer_overhead_s: float
    row_overhead_s: float
    step_overhead_s: float
    sharing: Sharing | None
    compute_bound_streams: int | None
    limits: str
    datasheet: Datasheet | None


@dataclass(frozen=True, slots=True)
class LinkDiagnosis:
    """One direction between two devices; `method` is "p2p" (peer to peer), "staged" (through the host) or "copy"."""

    src: str
    dst: str
    method: str
    source: str
    latency_s: float
    bandwidth_bytes_s: float


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything; `model` and `dtype` say for which layers the devices were measured."""

    model: str
    dtype: str
    torch: str
    cpu_threads: int
    devices: tuple[DeviceDiagnosis, ...]
    links: tuple[LinkDiagnosis, ...]
    warnings: tuple[str, ...]


def diagnose(settings: Settings, refresh: bool = False, *, budget_s: float = DEVICE_BUDGET_S) -> Diagnosis:
    """Measure the devices of `settings` for its model (the demo model if none is set), or take what the store has.

    Args:
        refresh: measure whatever the store has.
        budget_s: seconds of measuring per device.

    Raises `ModelError`, `DeviceError`.
    """
    resolved = resolve_model(settings.model.name, settings.model.revision, cache_dir=settings.runtime.cache_dir)
    devices = open_devices(settings.devices, allocate=False)
    architecture, _ = served_architecture(
        resolved.path, settings.model.dtype, devices, QuantizeChoice.of(settings.model)
    )
    machine = probe_machine()
    memory = read_memory(devices, machine)
    threads = settings.devices.cpu_threads or torch.get_num_threads()
    profiler = LayerProfiler(settings, TransferManager(), threads, budget_s=budget_s)
    profiles = profiler.devices(devices, architecture, refresh=refresh, retry=True)
    links = profiler.links(devices, refresh=refresh).links
    attention = [select_attention(device, settings, threads)[0].name for device in devices]
    return Diagnosis(
        model=resolved.name,
        dtype=str(architecture.dtype).removeprefix("torch."),
        torch=torch.__version__,
        cpu_threads=threads,
        devices=tuple(
            diagnose_device(device, held, profile, backend, architecture.dtype, threads)
            for device, held, profile, backend in zip(devices, memory, profiles, attention, strict=True)
        ),
        links=tuple(
            LinkDiagnosis(src, dst, link.method, link.source, link.latency_s, link.bandwidth_bytes_s)
            for (src, dst), link in links.items()
        ),
        warnings=(
            *(f"No GPU: {reason}." for reason in machine.missing),
            *(f"{reason}." for reason in left_out(machine, devices)),
            *_kernel_warnings(settings, devices, attention),
            *noise_warnings(profiler.noise),
            *_memory_warnings(devices, memory),
        ),
    )


def diagnose_device(
    device: Device, memory: MemoryNow, profile: DeviceProfile, attention: str, dtype: torch.dtype, threads: int
) -> DeviceDiagnosis:
    """One device; `profile` is for layers of `dtype`, `threads` is how many a CPU computes with."""
    streams = compute_bound_streams(profile, dtype.itemsize)
    product = "emulated" if device.is_emulated else str(device_facts(device, threads)["product"])
    return DeviceDiagnosis(
        name=device.name,
        kind=device.kind,
        product=product,
        total_bytes=memory.total_bytes,
        free_bytes=memory.free_bytes,
        limit_bytes=memory.limit_bytes,
        attention=attention,
        source=profile.source,
        bandwidth_bytes_s=profile.bandwidth_bytes_s,
        kv_bandwidth_bytes_s=profile.kv_bytes_s,
        flops={str(rows): profile.flops_at(rows) for rows in SHOWN_ROWS},
        layer_overhead_s=profile.layer_overhead_s,
        row_overhead_s=profile.row_overhead_s,
        step_overhead_s=profile.step_overhead_s,
        sharing=profile.sharing,
        compute_bound_streams=streams,
        limits=what_limits(profile, dtype.itemsize, streams),
        datasheet=_datasheet(memory, product, profile, dtype) if not device.computes_on_cpu else None,
    )


def compute_bound_streams(profile: DeviceProfile, element_bytes: int) -> int | None:
    """The fewest rows for which a product takes clearly longer than for one; None: not up to thousands.

    Each weight of `element_bytes` bytes is read once and takes part in two operations per row.
    """
    one_s = max(element_bytes / profile.bandwidth_bytes_s, 2 / profile.flops_at(1))
    return next((n for n in range(2, _MOST_STREAMS + 1) if 2 * n / profile.flops_at(n) > _CLEARLY * one_s), None)


def format_rate(rate: float, unit: str) -> str:
    """A rate per second for people: "14.4 GB/s", "71 TFLOP/s"."""
    scale, prefix = next((item for item in ((1e12, "T"), (1e9, "G")) if rate >= item[0]), (1e6, "M"))
    return f"{rate / scale:.3g} {prefix}{unit}/s"


def what_limits(profile: DeviceProfile, element_bytes: int, streams: int | None) -> str:
    """A sentence: what holds a device back with few streams, and with many (from `streams` on; None: never)."""
    reading = f"memory bandwidth ({format_rate(profile.bandwidth_bytes_s, 'B')})"
    reached = profile.flops_at(1) / 2 * element_bytes
    if reached * _CALLS < profile.bandwidth_bytes_s:
        reading = f"what each call costs (so small, weights are read at {format_rate(reached, 'B')}) and {reading}"
    computing = f"computing ({format_rate(max(rate for _, rate in profile.flops), 'FLOP')} at most)"
    if streams is None:
        return f"{profile.name} is limited by {reading}, however many streams there are."
    return f"{profile.name} is limited by {reading} below {streams} streams, and by {computing} from there on."


def _datasheet(memory: MemoryNow, product: str, profile: DeviceProfile, dtype: torch.dtype) -> Datasheet | None:
    """What the maker promises of a card. Sizes are asked for first: cards of one name may differ in more than that."""
    for name in (f"{product} {round(memory.total_bytes / _GIB)}GB", product):
        try:
            found = card(name)
        except DeviceError:
            continue
        best, promised = max(rate for _, rate in profile.flops), found.profile
        return Datasheet(
            card=found.name,
            bandwidth_bytes_s=promised.bandwidth_bytes_s,
            flops=promised.flops_at(1),
            bandwidth_share=profile.bandwidth_bytes_s / promised.bandwidth_bytes_s,
            flops_share=best / promised.flops_at(1) if dtype in (torch.bfloat16, torch.float16) else None,
        )
    return None


def _kernel_warnings(settings: Settings, devices: Sequence[Device], attention: Sequence[str]) -> list[str]:
    found = []
    attends = list(zip(devices, attention, strict=True))
    slow_cpus = [device.name for device, name in attends if device.computes_on_cpu and name != "native"]
    if slow_cpus:
        if not settings.engine.native_kernels:
            reason = "engine.native_kernels is off"
        elif not find_compilers():
            reason = "no C compiler is found (install gcc or clang)"
        else:
            reason = "they cannot be built or loaded; the log says why"
        found.append(f"{', '.join(slow_cpus)} computes without the native kernels, several times slower: {reason}.")
    for device, name in attends:
        if device.kind in ("cuda", "rocm") and name != "triton":
            found.append(f"{device.name} attends in plain torch: {probe_triton(device.torch_device)[1]}.")
    return found


def noise_warnings(noise: Mapping[str, Noise]) -> list[str]:
    """For devices that had other work while they were measured, by name."""
    return [
        f"{name} was busy with other work ({found.busy:.0%} of the time) when it was measured: its speeds come out too "
        "low. The next doctor measures it again, if it is idle then."
        for name, found in noise.items()
        if found.is_much
    ]


def _memory_warnings(devices: Sequence[Device], memory: Sequence[MemoryNow]) -> list[str]:
    found = []
    shared: dict[str, list[MemoryNow]] = defaultdict(list)
    for device, held in zip(devices, memory, strict=True):
        if not device.is_emulated:
            shared[device.torch_device].append(held)
    for parts in shared.values():
        names, first = ", ".join(part.device for part in parts), parts[0]
        wanted = sum(part.limit_bytes for part in parts)
        free, total = format_bytes(first.free_bytes), format_bytes(first.total_bytes)
        if wanted > first.free_bytes:
            found.append(f"{names} may use {format_bytes(wanted)}, but only {free} of {total} are free now.")
        elif first.free_bytes < _LOW_SHARE * first.total_bytes:
            found.append(f"{names}: only {free} of {total} are free; other processes hold the rest.")
    swap = psutil.swap_memory()
    if swap.used > _SWAP_BYTES:
        found.append(
            f"{format_bytes(swap.used)} of swap are in use: weights that are swapped out make steps wait for the disk."
        )
    return found
