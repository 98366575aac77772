"""How much of a card's nominal memory a model can have, where the card is not here to ask."""

from __future__ import annotations

import re
from dataclasses import replace

from core.costs.plan import PlacementDevice

GIB = 1024**3

DRIVER_SHARE = 0.013
"""Of a card's memory: an RTX 3090 of 24 GiB reports 23.69."""
CONTEXT_BYTES = GIB // 2
"""What a process's context, kernels and libraries take before the first tensor."""
DESKTOP_BYTES = GIB // 2
"""What a screen with a browser takes, of a card that may drive one."""
_DRIVES_SCREENS = re.compile(r"^(GTX|RTX|RX|Arc|Radeon)\b")

_APPLE = re.compile(r"^M\d")
_SMALL_MAC_BYTES = 36 * GIB
_MAC_SHARE = 0.75
_SMALL_MAC_SHARE = 2 / 3
"""Of a Mac's memory, what macOS gives its GPU unless told otherwise (recommendedMaxWorkingSetSize of Metal)."""


def usable(device: PlacementDevice) -> PlacementDevice:
    """A card of `core.costs.cards` with the memory that is left for a model. What is described by its size is taken at
    its word."""
    if "@" in device.name:
        return device
    if _APPLE.match(device.name):
        share = _SMALL_MAC_SHARE if device.limit_bytes <= _SMALL_MAC_BYTES else _MAC_SHARE
        return replace(device, limit_bytes=int(device.limit_bytes * share))
    kept = int(DRIVER_SHARE * device.limit_bytes) + CONTEXT_BYTES
    if _DRIVES_SCREENS.match(device.name):
        kept += DESKTOP_BYTES
    return replace(device, limit_bytes=device.limit_bytes - kept)
