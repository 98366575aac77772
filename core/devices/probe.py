"""Looks at the machine: which devices there are, which of them are of use, and how much memory is free now."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from core.devices.device import Device, DeviceKind
from core.devices.kernels import runs_on_amd, runs_on_nvidia

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, slots=True)
class PhysicalDevice:
    """A device of this machine, with its memory at the time of probing.

    Attributes:
        free_bytes: what nobody uses; `ours_bytes` more are held by this process.
        drawback: why it is not used unless it is named; empty if there is no reason.
        is_usable: whether torch can compute on it at all; `drawback` says why not.
    """

    name: str
    kind: DeviceKind
    torch_device: str
    product: str
    total_bytes: int
    free_bytes: int
    ours_bytes: int = 0
    drawback: str = ""
    is_usable: bool = True


@dataclass(frozen=True, slots=True)
class Machine:
    """What was found: accelerators, the CPU, and for each kind that is missing the reason."""

    gpus: tuple[PhysicalDevice, ...]
    cpu: PhysicalDevice
    missing: tuple[str, ...] = ()

    def find(self, name: str) -> PhysicalDevice | None:
        return next((device for device in (*self.gpus, self.cpu) if device.name == name), None)


def probe_machine() -> Machine:
    """Ask torch and the operating system what there is. Initialises the GPUs' runtime."""
    (cuda, no_cuda), (mps, no_mps) = _probe_cuda(), _probe_mps()
    return Machine((*cuda, *mps), probe_cpu(), tuple(reason for reason in (no_cuda, no_mps) if reason))


def _probe_cuda() -> tuple[list[PhysicalDevice], str]:
    """CUDA and ROCm devices: torch drives both through `torch.cuda`."""
    import torch

    kind: DeviceKind = "rocm" if torch.version.hip else "cuda"
    label = "ROCm" if kind == "rocm" else "CUDA"
    if torch.version.hip is None and torch.version.cuda is None:
        return [], "no CUDA device: torch was built without CUDA"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        details = "; ".join(str(warning.message).splitlines()[0] for warning in caught)
        return [], f"no {label} device: {details or 'the driver reports none'}"
    found = [_look_at_gpu(ordinal, kind, torch.cuda.get_arch_list()) for ordinal in range(torch.cuda.device_count())]
    return found, "" if found else f"no {label} device: none is visible"


def _look_at_gpu(ordinal: int, kind: DeviceKind, kernels: Sequence[str]) -> PhysicalDevice:
    """A card that is not used by itself is not asked for its free memory: that would take some of it."""
    import torch

    properties: Any = torch.cuda.get_device_properties(ordinal)
    name, total = f"{kind}:{ordinal}", int(properties.total_memory)
    if kind == "rocm":
        chip = str(properties.gcnArchName).partition(":")[0]
        usable = runs_on_amd(chip, kernels)
    else:
        chip = f"compute capability {properties.major}.{properties.minor}"
        usable = runs_on_nvidia(properties.major, properties.minor, kernels)
    found = PhysicalDevice(name, kind, f"cuda:{ordinal}", str(properties.name), total, total)
    if not usable:
        drawback = f"this torch ({torch.__version__}, for {', '.join(kernels)}) has no kernels for its {chip}"
        return replace(found, drawback=drawback, is_usable=False)
    if properties.is_integrated or (kind == "rocm" and _APU.search(found.product)):
        drawback = "it is part of the processor and shares main memory"
        return replace(found, free_bytes=min(total, psutil.virtual_memory().available), drawback=drawback)
    free, total = torch.cuda.mem_get_info(ordinal)
    return replace(found, total_bytes=total, free_bytes=free, ours_bytes=torch.cuda.memory_reserved(ordinal))


_APU = re.compile(r"Radeon(\(TM\)| \(TM\))?( \d{3,4}[MS])? Graphics")
"""AMD's names of graphics inside a processor, which older drivers do not call integrated."""


def _probe_mps() -> tuple[list[PhysicalDevice], str]:
    import torch

    if not torch.backends.mps.is_available():
        return [], ""  # worth a line on a Mac only, where torch always has it
    free, total = torch_memory(Device("mps", 0, "mps", "mps", 0))
    return [PhysicalDevice("mps", "mps", "mps", "Apple GPU", total, free)], ""


def probe_cpu() -> PhysicalDevice:
    memory = psutil.virtual_memory()
    total = min(memory.total, _container_limit_bytes() or memory.total)
    return PhysicalDevice("cpu", "cpu", "cpu", "CPU and main memory", total, min(memory.available, total))


def _container_limit_bytes() -> int | None:
    """The memory limit of the container this process runs in; None without one."""
    try:
        text = _CGROUP_LIMIT.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


@dataclass(frozen=True, slots=True)
class MemoryNow:
    """Memory of a logical device's physical device at this moment, other processes' use included.

    `limit_bytes` is what a plan may use of it. Parts of one device share `free_bytes`.
    """

    device: str
    product: str
    total_bytes: int
    free_bytes: int
    limit_bytes: int

    @property
    def usable_bytes(self) -> int:
        """What could really be allocated now, within the limit."""
        return min(self.free_bytes, self.limit_bytes)


def read_memory(devices: Sequence[Device], machine: Machine | None = None) -> tuple[MemoryNow, ...]:
    """Free memory as it is, one entry per device; `machine` is probed now unless given."""
    machine = machine or probe_machine()
    physical = {found.torch_device: found for found in (machine.cpu, *machine.gpus)}
    return tuple(
        MemoryNow(device.name, found.product, found.total_bytes, found.free_bytes, device.memory_limit_bytes)
        for device in devices
        for found in (physical[device.torch_device],)
    )


def free_bytes_of(device: Device) -> int:
    """Free memory of a logical device's physical device now, other processes' use included. Asks that device alone, in
    well under a millisecond, and may be called while a model serves: a machine is probed at the start only."""
    return probe_cpu().free_bytes if device.computes_on_cpu else torch_memory(device)[0]


def torch_memory(device: Device) -> tuple[int, int]:
    """Free and total bytes of an accelerator, as torch tells them."""
    import torch

    if device.is_mps:
        total = torch.mps.recommended_max_memory()
        return total - torch.mps.driver_allocated_memory(), total
    return torch.cuda.mem_get_info(device.torch_device)
