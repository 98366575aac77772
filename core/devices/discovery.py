"""Decides which of the machine's devices to use (`choose_devices`, pure), and opens them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from core.config import DeviceSettings
from core.devices.device import GPU_KINDS, Device, MainMemory, format_bytes
from core.devices.probe import Machine, PhysicalDevice, probe_cpu, probe_machine
from core.devices.spec import DeviceSpec, parse_devices
from core.errors import DeviceError
from core.logs import get_logger

logger = get_logger(__name__)

NOMINAL = 1.08
"""By which factor a card may be sold with more memory than its driver reports: with error correction, a fifteenth."""


def open_devices(
    settings: DeviceSettings, *, allocate: bool = True, set_aside_bytes: int = 0, main_bytes: int | None = None
) -> tuple[Device, ...]:
    """The devices to use on this machine, with their limits; the choice is logged with its reason.

    Args:
        allocate: False only plans, so emulated devices may be larger than this machine's memory.
        set_aside_bytes: main memory that a CPU device without a given limit leaves to others.
        main_bytes: main memory that such a device and these others have together; None: what is free now.

    Raises:
        DeviceError: the specification is wrong, or asks for more than the machine has.
    """
    machine = probe_machine()
    devices, reason = choose_devices(
        settings, machine, allocate=allocate, set_aside_bytes=set_aside_bytes, main_bytes=main_bytes
    )
    for device in devices:
        logger.info("device", name=device.name, limit=format_bytes(device.memory_limit_bytes), reason=reason)
    return devices


def choose_devices(
    settings: DeviceSettings, machine: Machine, *, allocate: bool = True, set_aside_bytes: int = 0,
    main_bytes: int | None = None,
) -> tuple[tuple[Device, ...], str]:  # fmt: skip
    """The devices to use, and why. Pure; raises `DeviceError` as `open_devices` does."""
    if settings.devices is not None:
        specs: Sequence[DeviceSpec] = parse_devices(settings.devices)
        reason = "asked for"
    elif chosen := [gpu for gpu in machine.gpus if not gpu.drawback]:
        specs = [DeviceSpec(gpu.name, gpu.kind, int(gpu.name.partition(":")[2] or 0)) for gpu in chosen]
        reason = "; ".join(["found", *left_out(machine)])
    else:
        reason = "; ".join([*machine.missing, *left_out(machine)])
        if settings.num_gpus is not None:
            raise DeviceError(f"num_gpus is {settings.num_gpus}, but there is no GPU: {reason}.", param="num_gpus")
        specs = [DeviceSpec(name="cpu", kind="cpu", ordinal=0)]
        reason += "; using cpu"
    count = settings.num_gpus
    if count is not None and count > len(specs):
        names = ", ".join(spec.name for spec in specs)
        raise DeviceError(f"num_gpus is {count}, but there are {len(specs)}: {names}.", param="num_gpus")
    specs, notes = _within_limits(specs[:count], machine, allocate=allocate)
    devices = tuple(
        _open(index, spec, machine, settings, set_aside_bytes, main_bytes) for index, spec in enumerate(specs)
    )
    return devices, "; ".join([reason, *notes])


def left_out(machine: Machine, used: Sequence[Device] = ()) -> list[str]:
    """The GPUs that are not used unless they are named, each with the reason, but for those that are `used`."""
    named = {device.torch_device for device in used}
    gpus = [gpu for gpu in machine.gpus if gpu.drawback and gpu.torch_device not in named]
    return [f"{gpu.name} ({gpu.product}) is left out: {gpu.drawback}" for gpu in gpus]


def open_main_memory(settings: DeviceSettings) -> MainMemory:
    """The ledger of main memory, with a share of what is free now. Made once, before anything is loaded."""
    return MainMemory(int(probe_cpu().free_bytes * settings.memory_fraction))


def grant_bytes(asked: Sequence[int], physical: PhysicalDevice) -> tuple[int, ...] | None:
    """The limits of parts of a device for which `asked` were given, or None if that is more than the device has.

    A driver reports less than a card is sold with (23.69 GiB of a 3090's 24): so much, or a little more than reported,
    means all that this process can have of the card, divided as asked.
    """
    together = sum(asked)
    if together <= physical.total_bytes:
        return tuple(asked)
    if physical.kind not in GPU_KINDS or together > NOMINAL * physical.total_bytes:
        return None
    available = min(physical.total_bytes, physical.free_bytes + physical.ours_bytes)
    return tuple(available * nbytes // together for nbytes in asked)


def _within_limits(
    specs: Sequence[DeviceSpec], machine: Machine, *, allocate: bool
) -> tuple[Sequence[DeviceSpec], list[str]]:
    """The devices with limits that their physical devices have, and what there is to say about them. Every device
    exists and can be used."""
    granted: dict[str, int] = {}
    notes = []
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
        if not physical.is_usable:
            raise DeviceError(f"{name} ({physical.product}) cannot be used: {physical.drawback}.", param="devices")
        limited = [member for member in members if member.limit_bytes is not None]
        limits = grant_bytes([member.limit_bytes or 0 for member in limited], physical)
        asked = sum(member.limit_bytes or 0 for member in limited)
        if limits is None:
            listed = " + ".join(f"{member.name} {format_bytes(member.limit_bytes or 0)}" for member in members)
            raise DeviceError(
                f"{listed} = {format_bytes(asked)} is more than the {format_bytes(physical.total_bytes)} of memory "
                f"that {name} ({physical.product}) has.",
                param="devices",
            )
        granted |= {member.name: limit for member, limit in zip(limited, limits, strict=True)}
        if sum(limits) < asked:
            notes.append(
                f"{format_bytes(asked)} of {name} ({physical.product}) are taken as all of it, "
                f"{format_bytes(sum(limits))}"
            )
    return [replace(spec, limit_bytes=granted.get(spec.name, spec.limit_bytes)) for spec in specs], notes


def _open(
    index: int, spec: DeviceSpec, machine: Machine, settings: DeviceSettings, set_aside_bytes: int,
    main_bytes: int | None,
) -> Device:  # fmt: skip
    physical = machine.find(spec.physical_name) or machine.cpu
    limit = spec.limit_bytes
    if limit is None:
        limit = int(physical.free_bytes * settings.memory_fraction)
        if physical is machine.cpu:
            limit = limit if main_bytes is None else min(limit, main_bytes)
            limit = max(0, limit - set_aside_bytes)
    return Device(spec.name, index, spec.kind, physical.torch_device, limit, spec.speed)
