"""Devices for planning without them: known cards at the speed of their datasheets, and described ones. What is measured
overrides them."""

from __future__ import annotations

import re
from dataclasses import replace

from core.costs import PlacementDevice
from core.costs.card_table import GPU_SYNTAX, Card, find_card, known_cards
from core.costs.profile import DeviceProfile
from core.devices.spec import numbered, parse_devices
from core.errors import DeviceError

DATASHEET_LAYER_OVERHEAD_S = 0.3e-3
"""Per layer and forward pass, since datasheets have no such figure: what Python and torch's dispatch of a layer's 40
operations take on a host, as it was measured. The card waits for that until whole steps are captured."""

ASSUMED_FLOPS_PER_BYTE = 75
"""Matrix operations per byte of bandwidth where a card's compute is not given: an RTX 3090's; newer ones have more."""

_COUNT = re.compile(r"(.+?)\s*\*\s*(\d{1,2})")


def card(name: str) -> PlacementDevice:
    """The card of that name, however it is written (see `find_card`), with all of its memory.

    Raises `DeviceError` if there is no such card; it names those that look like it.
    """
    found = find_card(name)
    return _device(found.name, found.memory_bytes, found.bandwidth_bytes_s, found.flops)


def gpu_spec(*texts: str) -> tuple[PlacementDevice, ...]:
    """The devices that `--gpu` describes, in its order; several of a name become "RTX 3090#0", "RTX 3090#1".

    Raises `DeviceError` if a text does not follow `GPU_SYNTAX`, or names a card that is not known.
    """
    devices = []
    for text in texts:
        counted = _COUNT.fullmatch(text.strip())
        what, count = (counted[1], int(counted[2])) if counted else (text.strip(), 1)
        if count < 1 or "*" in what:
            raise DeviceError(f'gpu "{text}" is no number of cards. Allowed: {GPU_SYNTAX}.', param="gpu")
        devices += [_described(what) if "@" in what else card(what)] * count
    names = numbered([device.name for device in devices])
    return tuple(replace(device, name=name) for device, name in zip(devices, names, strict=True))


def card_of(device: PlacementDevice) -> Card | None:
    """The card that a device of `gpu_spec` stands for; None for one that was described."""
    name = device.name.partition("#")[0]
    return next((found for found in known_cards() if found.name == name), None)


def _device(name: str, limit_bytes: int, bandwidth_bytes_s: float, flops: float) -> PlacementDevice:
    profile = DeviceProfile(
        name, bandwidth_bytes_s, ((1, flops),), layer_overhead_s=DATASHEET_LAYER_OVERHEAD_S, source="datasheet"
    )
    return PlacementDevice(name, limit_bytes, profile)


def _described(text: str) -> PlacementDevice:
    """ "24GiB@936GB/s" with or without "/71TFLOPS"."""
    whole = "flops" in text.lower()
    try:
        (spec,) = parse_devices(f"sim={text if whole else text + '/1TFLOPS'}")
    except (DeviceError, ValueError):
        raise DeviceError(f'gpu "{text}" is no description of a card. Allowed: {GPU_SYNTAX}.', param="gpu") from None
    assert spec.speed is not None and spec.limit_bytes is not None
    bandwidth = spec.speed.bandwidth_bytes_s
    flops = spec.speed.flops if whole else bandwidth * ASSUMED_FLOPS_PER_BYTE
    return _device(text, spec.limit_bytes, bandwidth, flops)
