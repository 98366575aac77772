"""Latency and bandwidth of links between devices: from the store where they are known, else by short real transfers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from core.config import Settings
from core.costs import LinkProfile, LinkTopology
from core.devices import HOST, Device, parse_link
from core.devices.pinned import HostBuffer
from core.logs import get_logger
from core.profiling import measure
from core.profiling.profile_store import Facts, ProfileStore, device_facts, key_of
from core.transfer import TransferManager

logger = get_logger(__name__)

_SMALL_BYTES, _LARGE_BYTES = 4 * 1024, 8 * 1024 * 1024
_LINK_SHARE = 0.04


class LinkProfiler:
    """Measures links once each; `transfer` counts what is sent for it. `budget_s` is what a device gets."""

    def __init__(self, settings: Settings, transfer: TransferManager, cpu_threads: int, budget_s: float) -> None:
        self.store = ProfileStore(settings.runtime.cache_dir / "profiles")
        self._settings = settings
        self._transfer = transfer
        self._cpu_threads = cpu_threads
        self._budget_s = budget_s

    def links(self, devices: Sequence[Device], *, refresh: bool = False) -> LinkTopology:
        """Latency and bandwidth of every ordered pair of devices; `refresh` measures what the store already has.

        Links of emulated devices have the speed that `devices.sim_link` gives them, if it does.
        """
        known: dict[str, LinkProfile] = {}
        pairs = itertools.permutations(devices, 2)
        return LinkTopology({(src.name, dst.name): self._link(src, dst, refresh, known) for src, dst in pairs})

    def host_links(self, devices: Sequence[Device]) -> dict[tuple[str, str], LinkProfile]:
        """From main memory to each device, for weights that stream in; emulated devices as in `links`."""
        return {(HOST, device.name): self._link(None, device, False, {}) for device in devices}

    def _link(self, src: Device | None, dst: Device, refresh: bool, known: dict[str, LinkProfile]) -> LinkProfile:
        """From a device, or (None) from main memory; `known` is what was found for other devices."""
        method = "stream" if src is None else self._transfer.method(src, dst)
        emulated = self._settings.devices.sim_link
        if emulated is not None and (dst.is_emulated or (src is not None and src.is_emulated)):
            speed = parse_link(emulated)
            return LinkProfile(speed.bandwidth_bytes_s, speed.latency_s, method, "emulated")
        facts: dict[str, Any] = {"dst": self._end(dst), "method": method, "torch": torch.__version__}
        if src is None:
            facts["src"] = HOST
        else:
            facts |= {"src": self._end(src), "same_device": src.torch_device == dst.torch_device}
        key = key_of(facts)
        if key not in known:
            stored = None if refresh else self.store.load("link", facts)
            known[key] = self._measure(src, dst, method) if stored is None else LinkProfile(**stored, method=method)
            if stored is None:
                self.store.save("link", facts, known[key])
        return known[key]

    def _end(self, device: Device) -> Facts:
        """One end of a link: cards of one model may sit in slots that differ."""
        uuid = None
        if device.is_gpu:
            uuid = str(getattr(torch.cuda.get_device_properties(device.torch_device), "uuid", device.torch_device))
        return device_facts(device, self._cpu_threads) | {"uuid": uuid}

    def _measure(self, src: Device | None, dst: Device, method: str) -> LinkProfile:
        """From the times of a small and of a large transfer, which end when the data has arrived."""
        with measure.computing_as_served(src or dst, 1):  # the other threads are with the stages that compute meanwhile
            small_s, large_s = (
                self._time_load(dst, nbytes) if src is None else self._time_send(src, dst, nbytes)
                for nbytes in (_SMALL_BYTES, _LARGE_BYTES)
            )
        further = _LARGE_BYTES - _SMALL_BYTES
        bandwidth = further / (large_s - small_s) if large_s > small_s else _LARGE_BYTES / large_s
        latency_s = max(0.0, small_s - _SMALL_BYTES / bandwidth)
        logger.info(
            "link measured",
            src=HOST if src is None else src.name, dst=dst.name, method=method,
            gigabytes_s=round(bandwidth / 1e9, 2), latency_us=round(latency_s * 1e6, 1),
        )  # fmt: skip
        return LinkProfile(bandwidth, latency_s, method)

    def _time_load(self, device: Device, nbytes: int) -> float:
        source = HostBuffer("profiling", nbytes, pin=device.is_gpu)
        source.memory.fill_(1)
        target = torch.empty(nbytes, dtype=torch.uint8, device=device.torch_device)
        try:
            return self._time(lambda: self._transfer.load(source.memory, target, device))
        finally:
            source.close()

    def _time_send(self, src: Device, dst: Device, nbytes: int) -> float:
        payload = torch.ones(nbytes, dtype=torch.uint8, device=src.torch_device)
        measure.synchronize(payload.device)
        return self._time(lambda: measure.synchronize(self._transfer.send(payload, src, dst).device))

    def _time(self, transfer: Callable[[], object]) -> float:
        host = torch.device("cpu")  # the transfer has waited for the devices: the wall clock is theirs
        return measure.time_runs(transfer, host, _LINK_SHARE * self._budget_s)
