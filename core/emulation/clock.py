"""An emulated device's time within a forward pass."""

from __future__ import annotations

import time

from core.costs import Batch, StageTimer
from core.devices import Device, wait_until
from core.streaming.stream import Clock


class EmulatedClock(Clock):
    """Lets a stage take as long as its device would have: at the end of a pass, and before and after each layer that
    streams in, so that loading goes on beside computing as it would there. Real devices take what they take.
    """

    def __init__(self, device: Device, timer: StageTimer | None, first_layer: int) -> None:
        self._timer = timer if device.speed is not None else None
        self._first = self._layer = first_layer
        self._batch = Batch(0, 0, 0)
        self._since_s = self._spent_s = 0.0

    def begin(self, batch: Batch) -> None:
        """A pass begins."""
        self._batch, self._layer = batch, self._first
        self._since_s, self._spent_s = time.perf_counter(), 0.0

    def reach(self, layer: int) -> None:
        """Wait until the layers before `layer` are computed."""
        if self._timer is not None and layer > self._layer:
            self._spend(self._timer.layers_s(self._batch, self._layer, layer))
            self._layer = layer

    def resume(self) -> None:
        """Computing goes on now, after a wait."""
        self._since_s = max(self._since_s, time.perf_counter())

    def end(self, waited_s: float = 0.0) -> None:
        """Wait for what is left of the pass, `waited_s` for other devices included."""
        if self._timer is not None:
            self._spend(self._timer.compute_s(self._batch) + waited_s - self._spent_s)

    def _spend(self, seconds: float) -> None:
        self._since_s += seconds
        wait_until(self._since_s)
        self._spent_s += seconds
