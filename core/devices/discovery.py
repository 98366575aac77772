"""Looks at the machine (`probe_machine`), then decides purely which devices to use (`choose_devices`)."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from core.config import DeviceSettings
from core.devices.device import Device, DeviceKind, format_bytes
from core.devices.main_memory import MainMemory
from core.devices.spec import DeviceSpec, parse_devices
from core.errors import DeviceError
from core.logs import get_logger

logger = get_logger(__name__)

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, slots=True)
class PhysicalDevice:
    """A device of this machine, with its memory at the time of probing."""

    name: str
    kind: DeviceKind
    torch_device: str
    product: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What was found: accelerators, the CPU, and for each kind that is missing the reason."""

    gpus: tuple[PhysicalDevice, ...]
    cpu: PhysicalDevice
    missing: tuple[str, ...] = ()

    def find(self, name: str) -> PhysicalDevice | None:
        return next((device for device in (*self.gpus, self.cpu) if device.name == name), None)


def open_devices(settings: DeviceSettings, *, allocate: bool = True, set_aside_bytes: int = 0) -> tuple[Device, ...]:
    """The devices to use on this machine, with their limits; the choice is logged with its reason.

    Args:
        allocate: False only plans, so emulated devices may be larger than this machine's memory.
        set_aside_bytes: main memory that a CPU device without a given limit leaves to others.

    Raises:
        DeviceError: the specification is wrong, or asks for more than the machine has.
    """
    machine = probe_machine()
    devices, reason = choose_devices(settings, machine, allocate=allocate, set_aside_bytes=set_aside_bytes)
    for device in devices:
        logger.info("device", name=device.name, limit=format_bytes(device.memory_limit_bytes), reason=reason)
    return devices


def choose_devices(
    settings: DeviceSettings, machine: Machine, *, allocate: bool = True, set_aside_bytes: int = 0
) -> tuple[tuple[Device, ...], str]:
    """The devices to use, and why. Pure; raises `DeviceError` as `open_devices` does."""
    if settings.devices is not None:
        specs: Sequence[DeviceSpec] = parse_devices(settings.devices)
        reason = "asked for"
    elif machine.gpus:
        specs = [DeviceSpec(name=gpu.name, kind=gpu.kind, ordinal=_ordinal(gpu)) for gpu in machine.gpus]
        reason = "found"
    else:
        reason = "; ".join(machine.missing)
        if settings.num_gpus is not None:
            raise DeviceError(f"num_gpus is {settings.num_gpus}, but there is no GPU: {reason}.", param="num_gpus")
        specs = [DeviceSpec(name="cpu", kind="cpu", ordinal=0)]
        reason += "; using cpu"
    specs = _take(specs, settings.num_gpus)
    _check_limits(specs, machine, allocate=allocate)
    return tuple(_open(index, spec, machine, settings, set_aside_bytes) for index, spec in enumerate(specs)), reason


def open_main_memory(settings: DeviceSettings) -> MainMemory:
    """The ledger of main memory, with a share of what is free now. Made once, before anything is loaded."""
    return MainMemory(int(_probe_cpu().free_bytes * settings.memory_fraction))


def _ordinal(gpu: PhysicalDevice) -> int:
    return int(gpu.name.partition(":")[2] or 0)


def _take(specs: Sequence[DeviceSpec], count: int | None) -> Sequence[DeviceSpec]:
    if count is not None and count > len(specs):
        names = ", ".join(spec.name for spec in specs)
        raise DeviceError(f"num_gpus is {count}, but there are {len(specs)}: {names}.", param="num_gpus")
    return specs[:count]


def _check_limits(specs: Sequence[DeviceSpec], machine: Machine, *, allocate: bool) -> None:
    """Every device exists, and the limits of its parts together do not exceed its memory."""
    parts: dict[str, list[DeviceSpec]] = defaultdict(list)
    for spec in specs:
        if spec.kind != "sim" or allocate:
            parts[spec.physical_name].append(spec)
    for name, members in parts.items():
        physical = machine.find(name)
        if physical is None:
            there = ", ".join(device.name for device in (*machine.gpus, machine.cpu))
            reasons = f" ({'; '.join(machine.missing)})" if machine.missing else ""
            raise DeviceError(f"{name} is not there; this machine has {there}{reasons}.", param="devices")
        asked = sum(member.limit_bytes or 0 for member in members)
        if asked > physical.total_bytes:
            listed = " + ".join(f"{member.name} {format_bytes(member.limit_bytes or 0)}" for member in members)
            raise DeviceError(
                f"{listed} = {format_bytes(asked)} is more than the {format_bytes(physical.total_bytes)} of memory "
                f"that {name} ({physical.product}) has.",
                param="devices",
            )


def _open(index: int, spec: DeviceSpec, machine: Machine, settings: DeviceSettings, set_aside_bytes: int) -> Device:
    physical = machine.find(spec.physical_name) or machine.cpu
    limit = spec.limit_bytes
    if limit is None:
        limit = int(physical.free_bytes * settings.memory_fraction)
        if physical is machine.cpu:
            limit = max(0, limit - set_aside_bytes)
    return Device(
        name=spec.name,
        index=index,
        kind=spec.kind,
        torch_device=physical.torch_device,
        memory_limit_bytes=limit,
        speed=spec.speed,
    )


def probe_machine() -> Machine:
    """Ask torch and the operating system what there is. Initialises the GPUs' runtime."""
    missing: list[str] = []
    gpus: list[PhysicalDevice] = []
    for found, why_not in (_probe_cuda(), _probe_mps()):
        gpus += found
        if why_not:
            missing.append(why_not)
    return Machine(gpus=tuple(gpus), cpu=_probe_cpu(), missing=tuple(missing))


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
    found = []
    for ordinal in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(ordinal)
        product = torch.cuda.get_device_name(ordinal)
        found.append(PhysicalDevice(f"{kind}:{ordinal}", kind, f"cuda:{ordinal}", product, total, free))
    return found, "" if found else f"no {label} device: none is visible"


def _probe_mps() -> tuple[list[PhysicalDevice], str]:
    import torch

    if not torch.backends.mps.is_available():
        return [], ""  # worth a line on a Mac only, where torch always has it
    total = torch.mps.recommended_max_memory()
    free = total - torch.mps.driver_allocated_memory()
    return [PhysicalDevice("mps", "mps", "mps", "Apple GPU", total, free)], ""


def _probe_cpu() -> PhysicalDevice:
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
