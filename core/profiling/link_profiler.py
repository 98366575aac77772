"""Latency and bandwidth of links between devices: from the store where they are known, else by short real transfers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

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

    def __init__(
        self, settings: Settings, transfer: TransferManager, store: ProfileStore, cpu_threads: int, budget_s: float
    ) -> None:
        self._settings = settings
        self._transfer = transfer
        self._store = store
        self._cpu_threads = cpu_threads
        self._budget_s = budget_s

    def between(self, devices: Sequence[Device], refresh: bool) -> LinkTopology:
        """Every ordered pair of devices; `refresh` measures what the store already has."""
        known: dict[str, LinkProfile] = {}
        pairs = itertools.permutations(devices, 2)
        return LinkTopology({(src.name, dst.name): self._link(src, dst, refresh, known) for src, dst in pairs})

    def from_host(self, device: Device) -> LinkProfile:
        """From main memory, for weights that stream in."""
        emulated = self._settings.devices.sim_link
        if emulated is not None and device.is_emulated:
            speed = parse_link(emulated)
            return LinkProfile(speed.bandwidth_bytes_s, speed.latency_s, "stream", "emulated")
        facts = {"src": HOST, "dst": self._end(device), "method": "stream", "torch": torch.__version__}
        profile = self._store.load_link(facts, "stream")
        if profile is None:

            def time_load(nbytes: int) -> float:
                source = HostBuffer("profiling", nbytes, pin=device.is_gpu)
                source.memory.fill_(1)
                target = torch.empty(nbytes, dtype=torch.uint8, device=device.torch_device)
                try:
                    return self._time_link(lambda: self._transfer.load(source.memory, target, device))
                finally:
                    source.close()

            profile = self._measure_link(device, HOST, device.name, "stream", time_load)
            self._store.save_link(facts, profile)
        return profile

    def _link(self, src: Device, dst: Device, refresh: bool, known: dict[str, LinkProfile]) -> LinkProfile:
        method = self._transfer.method(src, dst)
        emulated = self._settings.devices.sim_link
        if emulated is not None and (src.is_emulated or dst.is_emulated):
            speed = parse_link(emulated)
            return LinkProfile(speed.bandwidth_bytes_s, speed.latency_s, method, "emulated")
        facts = {
            "src": self._end(src),
            "dst": self._end(dst),
            "same_device": src.torch_device == dst.torch_device,
            "method": method,
            "torch": torch.__version__,
        }
        key = key_of(facts)
        profile = known.get(key) or (None if refresh else self._store.load_link(facts, method))
        if profile is None:
            time_transfer = functools.partial(self._time_transfer, src, dst)
            profile = self._measure_link(src, src.name, dst.name, method, time_transfer)
            self._store.save_link(facts, profile)
        known[key] = profile
        return profile

    def _end(self, device: Device) -> Facts:
        """One end of a link: cards of one model may sit in slots that differ."""
        uuid = None
        if device.is_gpu:
            uuid = str(getattr(torch.cuda.get_device_properties(device.torch_device), "uuid", device.torch_device))
        return device_facts(device, self._cpu_threads) | {"uuid": uuid}

    def _measure_link(
        self, device: Device, src: str, dst: str, method: str, time_transfer: Callable[[int], float]
    ) -> LinkProfile:
        """From the times of a small and of a large transfer, which end when the data has arrived."""
        with measure.computing_as_served(device, 1):  # the other threads are with the stages that compute meanwhile
            small_s, large_s = (time_transfer(nbytes) for nbytes in (_SMALL_BYTES, _LARGE_BYTES))
        further = _LARGE_BYTES - _SMALL_BYTES
        bandwidth = further / (large_s - small_s) if large_s > small_s else _LARGE_BYTES / large_s
        latency_s = max(0.0, small_s - _SMALL_BYTES / bandwidth)
        logger.info(
            "link measured",
            src=src, dst=dst, method=method,
            gigabytes_s=round(bandwidth / 1e9, 2), latency_us=round(latency_s * 1e6, 1),
        )  # fmt: skip
        return LinkProfile(bandwidth, latency_s, method)

    def _time_transfer(self, src: Device, dst: Device, nbytes: int) -> float:
        payload = torch.ones(nbytes, dtype=torch.uint8, device=src.torch_device)
        measure.synchronize(payload.device)
        return self._time_link(lambda: measure.synchronize(self._transfer.send(payload, src, dst).device))

    def _time_link(self, transfer: Callable[[], object]) -> float:
        host = torch.device("cpu")  # the transfer has waited for the devices: the wall clock is theirs
        return measure.time_runs(transfer, host, _LINK_SHARE * self._budget_s)
