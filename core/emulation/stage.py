"""A stage beside emulated devices: it computes for real, and takes as long as they would have."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from functools import partial
from typing import Any

import torch

from core.costs import Batch, StageTimer
from core.devices import Device, wait_until
from core.execution.attention.merge import Part
from core.execution.attention.metadata import AttentionMetadata, AttentionSpec, Site
from core.execution.site_attention import SiteAttention
from core.execution.stage import Stage
from core.execution.step_buffers import InputBatch
from core.streaming.stream import Clock


class GuestTime:
    """Seconds of attention that emulated devices did for others, by device: a real one's memory is read by its own work
    and by guests in turn. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = defaultdict(float)

    def add(self, device: str, seconds: float) -> None:
        """A device has read its memory for another one for so long."""
        with self._lock:
            self._seconds[device] += seconds

    def pace(self, device: Device, nbytes: int, since_s: float) -> None:
        """A device has read so many bytes for another one since then; returns when an emulated one would have."""
        if device.speed is not None:
            reading_s = nbytes / device.speed.bandwidth_bytes_s
            self.add(device.name, reading_s)
            wait_until(since_s + reading_s)

    def take(self, device: str) -> float:
        """What has been added since the last call: the device's own work is late by that."""
        with self._lock:
            return self._seconds.pop(device, 0.0)


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


class EmulatedSites(SiteAttention):
    """Sites of which some are emulated. `extra_s` adds up what an emulated owner has to wait for other devices beyond
    its own part."""

    def __init__(self, *given: Any, guests: GuestTime) -> None:
        super().__init__(*given)
        self.extra_s = 0.0
        self._guests = guests
        self._token_bytes = {layer: nbytes // self._kv.block_size for layer, nbytes in self._kv.layer_bytes.items()}

    def _reading_s(self, layer: int, keys: int, device: Device) -> float:
        assert device.speed is not None
        return keys * self._token_bytes[layer] / device.speed.bandwidth_bytes_s

    def attend(self, layer: int, query: torch.Tensor, metadata: AttentionMetadata, spec: AttentionSpec) -> torch.Tensor:
        self._taken_s = 0.0
        result = super().attend(layer, query, metadata, spec)
        if self._owner.speed is not None:
            own_s = self._reading_s(layer, sum(metadata.sites[0].regions[0][1].host_seq_lens), self._owner)
            self.extra_s += max(0.0, self._taken_s - own_s)
        return result

    def _remote(self, *given: Any) -> Part:
        started_s = time.perf_counter()
        part = super()._remote(*given)
        self._taken_s = max(self._taken_s, time.perf_counter() - started_s)
        return part

    def _attend_there(self, layer: int, query: torch.Tensor, site: Site, device: Device, spec: AttentionSpec) -> Part:
        started_s = time.perf_counter()
        part = super()._attend_there(layer, query, site, device, spec)
        if device.speed is not None:
            reading_s = self._reading_s(layer, sum(sum(batch.host_seq_lens) for _, batch in site.regions), device)
            self._guests.add(device.name, reading_s)
            wait_until(started_s + reading_s)
        return part


class EmulatedStage(Stage):
    """On an emulated device, or beside one. `guests` is shared by all stages of an engine."""

    def __init__(self, *given: Any, guests: GuestTime, **named: Any) -> None:
        super().__init__(*given, **named)
        self._guests = guests
        self.clock: EmulatedClock = EmulatedClock(self.device, self._timer, self.part.first)
        self.make_sites = partial(EmulatedSites, guests=guests)
        self._waited_s = 0.0

    def timed(self, batch: InputBatch, hidden: torch.Tensor | None, work: Batch, wants_hidden: bool) -> torch.Tensor:
        self._work = work
        self._guests.take(self.device.name)  # what was done for others while this device was idle cost it nothing
        return super().timed(batch, hidden, work, wants_hidden)

    def forward(self, batch: InputBatch, hidden: torch.Tensor | None, wants_hidden: bool = False) -> torch.Tensor:
        """The same, and wait for what is left of the time that the device would have taken."""
        self.clock.begin(self._work)
        result = super().forward(batch, hidden, wants_hidden)
        self._waited_s = self._wait_for_others()
        self.clock.end(self._waited_s)
        return result

    def predicted(self, work: Batch) -> float:
        return super().predicted(work) + self._waited_s

    def _wait_for_others(self) -> float:
        """What the device had to wait for others in this step, and what it did for others meanwhile."""
        if self.device.speed is None or not isinstance(self._sites, EmulatedSites):
            return 0.0
        waited_s, self._sites.extra_s = self._sites.extra_s, 0.0
        return waited_s + self._guests.take(self.device.name)
