"""Reads device specifications such as `cuda:0=24GiB,cuda:0=16GiB` or `sim=24GiB@936GB/s/71TFLOPS`. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

from core.devices.device import GPU_KINDS, DeviceKind, DeviceSpeed, LinkSpeed
from core.errors import DeviceError

SYNTAX = (
    'a comma-separated list of cpu, mps, cuda:N or rocm:N, each with an optional limit such as "=24GiB", '
    'or sim=SIZE@BANDWIDTH/COMPUTE such as "sim=24GiB@936GB/s/71TFLOPS"'
)

_SIZE_UNITS = {"B": 1} | {
    prefix + suffix: base ** (power + 1)
    for power, prefix in enumerate("KMGT")
    for suffix, base in (("B", 1000), ("iB", 1024))
}
_FLOPS_UNITS = {"GFLOPS": 1e9, "TFLOPS": 1e12, "PFLOPS": 1e15}
_NUMBER = r"(\d+(?:\.\d+)?)"
_BASE = re.compile(r"(cpu|mps|sim|cuda|rocm)(?::(\d+))?")
_SIZE = re.compile(_NUMBER + r"\s*([KMGT]?i?B)", re.IGNORECASE)
_LINK = re.compile(_NUMBER + r"\s*([KMGT]?i?B)/s(?:@" + _NUMBER + r"\s*(ms|us|s))?", re.IGNORECASE)
_TIME_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_SPEED = re.compile(_NUMBER + r"\s*([KMGT]?i?B)/s/" + _NUMBER + r"\s*([GTP]FLOPS)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """One device as the user wrote it. `limit_bytes` None: a share of what is free when it is opened."""

    name: str
    kind: DeviceKind
    ordinal: int
    limit_bytes: int | None = None
    speed: DeviceSpeed | None = None

    @property
    def physical_name(self) -> str:
        """The physical device whose memory it takes: emulated devices take the CPU's."""
        if self.kind in GPU_KINDS:
            return f"{self.kind}:{self.ordinal}"
        return "mps" if self.kind == "mps" else "cpu"


def parse_devices(text: str) -> tuple[DeviceSpec, ...]:
    """The devices that `text` lists, in its order. Parts of a carved device are named "cpu#0", "cpu#1".

    Raises:
        DeviceError: the text does not follow `SYNTAX`; the message quotes the entry and says what is allowed.
    """
    specs = [_parse_entry(entry.strip()) for entry in text.split(",")]
    names = numbered([spec.name for spec in specs])
    for spec, name in zip(specs, names, strict=True):
        if name != spec.name and spec.limit_bytes is None:
            raise DeviceError(f'"{spec.name}" is listed more than once, so each needs a limit: {spec.name}=SIZE.')
    return tuple(replace(spec, name=name) for spec, name in zip(specs, names, strict=True))


def numbered(names: Sequence[str]) -> list[str]:
    """The names, with "#0", "#1" behind those that are there more than once."""
    return [f"{name}#{names[:turn].count(name)}" if names.count(name) > 1 else name for turn, name in enumerate(names)]


def _parse_entry(entry: str) -> DeviceSpec:
    base, equals, rest = entry.partition("=")
    matched = _BASE.fullmatch(base.strip())
    if matched is None:
        raise _refuse(entry, f"unknown device {base.strip()!r}")
    kind, ordinal = matched[1], matched[2]
    if ordinal is not None and kind not in GPU_KINDS:
        raise _refuse(entry, f"{kind} takes no number")
    size, at, speed = rest.partition("@")
    if bool(at) != (kind == "sim"):
        raise _refuse(entry, "sim needs a speed" if kind == "sim" else "only sim takes a speed")
    name = f"{kind}:{int(ordinal or 0)}" if kind in GPU_KINDS else kind
    limit_bytes = parse_size(entry, size.strip()) if equals else None
    device_speed = _parse_speed(entry, speed.strip()) if at else None
    return DeviceSpec(name, cast(DeviceKind, kind), int(ordinal or 0), limit_bytes, device_speed)


def parse_size(entry: str, text: str) -> int:
    """Bytes of a size such as "24GiB" in an entry of a list of devices. Raises `DeviceError`."""
    matched = _SIZE.fullmatch(text)
    if matched is None:
        raise _refuse(entry, f"{text!r} is not a size; write a number and one of {', '.join(_SIZE_UNITS)}")
    size = int(float(matched[1]) * _unit(matched[2], _SIZE_UNITS))
    if not 0 < size < 2**60:
        raise _refuse(entry, "the limit must be above 0 and below 1024 PiB")
    return size


def _parse_speed(entry: str, text: str) -> DeviceSpeed:
    matched = _SPEED.fullmatch(text)
    if matched is None:
        raise _refuse(entry, f"{text!r} is not a speed")
    speed = DeviceSpeed(
        bandwidth_bytes_s=float(matched[1]) * _unit(matched[2], _SIZE_UNITS),
        flops=float(matched[3]) * _unit(matched[4], _FLOPS_UNITS),
    )
    if speed.bandwidth_bytes_s <= 0 or speed.flops <= 0:
        raise _refuse(entry, "a speed must be above 0")
    return speed


def parse_link(text: str) -> LinkSpeed:
    """The speed of an emulated link, such as "11.6GB/s" or "11.6GB/s@30us". Raises `DeviceError`."""
    matched = _LINK.fullmatch(text.strip())
    if matched is None or float(matched[1]) == 0:
        raise DeviceError(
            f'link "{text}" is not a speed. Allowed: BANDWIDTH or BANDWIDTH@LATENCY, such as "11.6GB/s" or '
            '"11.6GB/s@30us".',
            param="sim_link",
        )
    latency_s = float(matched[3]) * _unit(matched[4], _TIME_UNITS) if matched[3] else 0.0
    return LinkSpeed(float(matched[1]) * _unit(matched[2], _SIZE_UNITS), latency_s)


def _unit(text: str, units: dict[str, int] | dict[str, float]) -> float:
    return next(factor for name, factor in units.items() if name.lower() == text.lower())


def _refuse(entry: str, problem: str) -> DeviceError:
    return DeviceError(f'device "{entry}": {problem}. Allowed: {SYNTAX}.', param="devices")
