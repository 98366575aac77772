"""`GPUMonitor`: reads devices again and again, on a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from core.devices.device import Device
from core.devices.readers import DeviceReader
from core.devices.readings import DeviceReading
from core.logs import get_logger

logger = get_logger(__name__)

MOST_SHARE = 0.01
"""Of the time, that reading may take: where drivers answer slowly, it is done less often."""


class GPUMonitor:
    """`readings` are the last ones by device, replaced as a whole. `devices` gives those to read, at each look; the
    monitor looks every `interval_s`, and no more often than reading allows."""

    def __init__(
        self, devices: Callable[[], Sequence[Device]], interval_s: float, reader: DeviceReader | None = None
    ) -> None:
        self.readings: Mapping[str, DeviceReading] = MappingProxyType({})
        self._devices = devices
        self._interval_s = interval_s
        self._reader = DeviceReader() if reader is None else reader
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._failed: str | None = None

    def start(self) -> None:
        """Look from now on. Safe to call twice."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="vrm-monitor", daemon=True)
            self._thread.start()

    def look(self) -> float:
        """Read once, here; returns the seconds that it took. What cannot be read at all has no reading."""
        began_s = time.perf_counter()
        try:
            found = self._reader.read(self._devices())
        except Exception as error:  # noqa: BLE001  drivers fail in many ways, and watching must not end with one
            if self._failed != repr(error):
                self._failed = repr(error)
                logger.warning("devices could not be read", error=self._failed)
            found = []
        self.readings = MappingProxyType({reading.device: reading for reading in found})
        return time.perf_counter() - began_s

    def _run(self) -> None:
        wait_s = 0.0
        while not self._stopped.wait(wait_s):
            wait_s = max(self._interval_s, self.look() / MOST_SHARE)

    def close(self) -> None:
        """End the thread and the driver's session. Safe to call twice."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        self._reader.close()
