"""Devices by name, of this machine and of others: `cpu=1GiB,desk2/cuda:0=20GiB`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from core.devices import Device, format_bytes
from core.devices.spec import parse_size
from core.errors import DeviceError, MissingNodeError


def divide(spec: str | None) -> tuple[str | None, tuple[str, ...] | None]:
    """What a specification says of this machine's devices, "" for none of them, and of other machines'. None: all."""
    if spec is None:
        return None, None
    entries = [entry.strip() for entry in spec.split(",")]
    there = tuple(entry for entry in entries if "/" in entry.partition("=")[0])
    return ",".join(entry for entry in entries if entry not in there), there


def choose(devices: Sequence[Device], asked: Sequence[str] | None) -> tuple[Device, ...]:
    """Those of other machines that are asked for, with their limits.

    Raises:
        MissingNodeError: one is not there.
        DeviceError: one has less memory, or is named twice.
    """
    if asked is None:
        return tuple(devices)
    known, chosen = {device.name: device for device in devices}, []
    for entry in asked:
        name, _, limit = (part.strip() for part in entry.partition("="))
        device = known.get(name)
        if device is None:
            there = ", ".join(known) or "none"
            raise MissingNodeError(
                f"{name} is not in the cluster; of other machines there are: {there}.", param="devices"
            )
        nbytes = parse_size(entry, limit) if limit else device.memory_limit_bytes
        if nbytes > device.memory_limit_bytes:
            raise DeviceError(
                f"{name} offers {format_bytes(device.memory_limit_bytes)}, less than the {format_bytes(nbytes)} asked "
                "for.",
                param="devices",
            )
        chosen.append(replace(device, memory_limit_bytes=nbytes))
    if len({device.name for device in chosen}) < len(chosen):
        raise DeviceError("a device of another machine is named twice.", param="devices")
    return tuple(chosen)


def with_nodes(spec: str | None, devices: Sequence[Device]) -> str | None:
    """A specification for what `spec` says of this machine and all `devices` of others. As it is where it says what of
    others is to be used: None is everything."""
    here, there = divide(spec)
    if spec is None or there:
        return spec
    return ",".join([*([here] if here else []), *(device.name for device in devices)])
