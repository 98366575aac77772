"""What emulated devices spend for others: a real one's memory is read by its own work and by guests in turn."""

from __future__ import annotations

import threading
from collections import defaultdict


class GuestTime:
    """Seconds of attention done for other devices, by device. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = defaultdict(float)

    def add(self, device: str, seconds: float) -> None:
        """A device has read its memory for another one for so long."""
        with self._lock:
            self._seconds[device] += seconds

    def take(self, device: str) -> float:
        """What has been added since the last call: the device's own work is late by that."""
        with self._lock:
            return self._seconds.pop(device, 0.0)
