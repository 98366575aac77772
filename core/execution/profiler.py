"""Profiles of devices and links, for placement: from the store where they are known, else by short real runs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from core.config import Settings
from core.devices import HOST, Device, Machine, format_bytes, parse_link, probe_machine
from core.errors import OutOfDeviceMemoryError
from core.execution import measure
from core.execution.attention.interface import AttentionBackend
from core.execution.attention.select import LinearAdapter, select_attention
from core.execution.measure import Overheads, Products, RandomLayers
from core.execution.native import do_all_products
from core.execution.profile_store import Facts, ProfileStore, device_facts, kernel_digest, key_of
from core.logs import get_logger
from core.models.architecture import Architecture
from core.models.stage_model import measure_bytes
from core.placement import DeviceProfile, LinkProfile, LinkTopology, emulated_profile
from core.transfer import TransferManager

logger = get_logger(__name__)

ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 512)
"""Rows of the matrix products that are measured: close together where steps of decodes are, since kernels work on some
rows at a time, and the rate rises in steps."""
DIP = 0.8
"""A rate below this share of one with fewer rows is doubted."""

DEVICE_BUDGET_S = 2.0
"""Seconds of measuring per device, without what is compiled and filled for it."""

_SMALL_BYTES, _LARGE_BYTES = 4 * 1024, 8 * 1024 * 1024
_BANDWIDTH_SHARE, _FLOPS_SHARE, _OVERHEAD_SHARE = 0.15, 0.55, 0.3
_LINK_SHARE = 0.04
_ROOM_SHARE = 2  # measuring takes up to half of what may be used


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What a decoder layer's speed depends on, beside its dtype."""

    model_type: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int

    @classmethod
    def of(cls, architecture: Architecture) -> LayerShape:
        """The shape of a middle layer; with experts, `intermediate` is one expert's."""
        config = architecture.config.get_text_config()
        names = ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner")
        sizes = [getattr(config, name, None) for name in names]
        kv = architecture.kv_shapes[architecture.num_layers // 2]
        return cls(
            model_type=architecture.model_type,
            hidden=architecture.hidden_size,
            intermediate=next((int(size) for size in sizes if size), 4 * architecture.hidden_size),
            heads=architecture.num_heads,
            kv_heads=kv.num_kv_heads,
            key_dim=kv.key_dim,
            value_dim=kv.value_dim,
        )


@dataclass(frozen=True, slots=True)
class MemoryNow:
    """Memory of a logical device's physical device at this moment, other processes' use included.

    `limit_bytes` is what a plan may use of it. Parts of one device share `free_bytes`.
    """

    device: str
    product: str
    total_bytes: int
    free_bytes: int
    limit_bytes: int

    @property
    def usable_bytes(self) -> int:
        """What could really be allocated now, within the limit."""
        return min(self.free_bytes, self.limit_bytes)


def read_memory(devices: Sequence[Device], machine: Machine | None = None) -> tuple[MemoryNow, ...]:
    """Free memory as it is, one entry per device; `machine` is probed now unless given."""
    machine = machine or probe_machine()
    physical = {found.torch_device: found for found in (machine.cpu, *machine.gpus)}
    return tuple(
        MemoryNow(device.name, found.product, found.total_bytes, found.free_bytes, device.memory_limit_bytes)
        for device in devices
        for found in (physical[device.torch_device],)
    )


class LayerProfiler:
    """Measures devices and links, once each: results are kept under `runtime.cache_dir / "profiles"`.

    Measure while nothing else computes on the devices. `transfer` counts what is sent for it. CPU devices compute with
    `cpu_threads` threads. `budget_s` seconds are spent per device; less gives rougher numbers.
    """

    def __init__(
        self, settings: Settings, transfer: TransferManager, cpu_threads: int, *, budget_s: float = DEVICE_BUDGET_S
    ) -> None:
        self._settings = settings
        self._transfer = transfer
        self._cpu_threads = cpu_threads
        self._budget_s = budget_s
        self.store = ProfileStore(settings.runtime.cache_dir / "profiles")

    def devices(
        self, devices: Sequence[Device], architecture: Architecture, *, refresh: bool = False
    ) -> tuple[DeviceProfile, ...]:
        """A profile per device, for layers of the architecture in its dtype.

        Parts of one physical device share one measurement. Emulated devices have the speed that they were given, and
        nothing is measured. `refresh` measures what the store already has. Raises `OutOfDeviceMemoryError` for a device
        without memory to measure in.
        """
        known: dict[str, DeviceProfile] = {}
        return tuple(self._device(device, architecture, refresh, known) for device in devices)

    def links(self, devices: Sequence[Device], *, refresh: bool = False) -> LinkTopology:
        """Latency and bandwidth of every ordered pair of devices. Links of emulated devices have the speed that
        `devices.sim_link` gives them, if it does.
        """
        known: dict[str, LinkProfile] = {}
        pairs = itertools.permutations(devices, 2)
        return LinkTopology({(src.name, dst.name): self._link(src, dst, refresh, known) for src, dst in pairs})

    def host_links(self, devices: Sequence[Device]) -> dict[tuple[str, str], LinkProfile]:
        """From main memory to each device, for weights that stream in; emulated devices as in `links`."""
        return {(HOST, device.name): self._host_link(device) for device in devices}

    def _host_link(self, device: Device) -> LinkProfile:
        emulated = self._settings.devices.sim_link
        if emulated is not None and device.kind == "sim":
            speed = parse_link(emulated)
            return LinkProfile(speed.bandwidth_bytes_s, speed.latency_s, "stream", "emulated")
        facts = {"src": HOST, "dst": self._end(device), "method": "stream", "torch": torch.__version__}
        profile = self.store.load_link(facts, "stream")
        if profile is None:
            pin = device.kind in ("cuda", "rocm")

            def time_load(nbytes: int) -> float:
                source = torch.ones(nbytes, dtype=torch.uint8, pin_memory=pin)
                target = torch.empty(nbytes, dtype=torch.uint8, device=device.torch_device)
                return self._time_link(lambda: self._transfer.load(source, target, device))

            profile = self._measure_link(device, HOST, device.name, "stream", time_load)
            self.store.save_link(facts, profile)
        return profile

    def _device(
        self, device: Device, architecture: Architecture, refresh: bool, known: dict[str, DeviceProfile]
    ) -> DeviceProfile:
        if device.speed is not None:
            return emulated_profile(device.name, device.speed.bandwidth_bytes_s, device.speed.flops)
        backend, adapter = select_attention(device, self._settings, self._cpu_threads)
        shape = LayerShape.of(architecture)
        facts = device_facts(device, self._cpu_threads) | {
            "torch": torch.__version__,
            "dtype": str(architecture.dtype).removeprefix("torch."),
            "shape": asdict(shape),
            "attention": backend.name,
            "native_kernels": adapter is not None,
            "kernels": kernel_digest(),
        }
        key = key_of(facts)
        profile = known.get(key) or (None if refresh else self.store.load_device(facts, device.name))
        if profile is None:
            profile = self._measure_device(device, architecture, shape, backend, adapter)
            self.store.save_device(facts, profile)
        known[key] = profile
        return replace(profile, name=device.name)

    def _measure_device(
        self,
        device: Device,
        architecture: Architecture,
        shape: LayerShape,
        backend: AttentionBackend,
        adapter: LinearAdapter | None,
    ) -> DeviceProfile:
        (memory,) = read_memory([device])
        room = memory.usable_bytes // _ROOM_SHARE
        with _computing_as_served(device, self._torch_threads(architecture.dtype, adapter)):
            try:
                bandwidth, flops = self._measure_products(device, architecture.dtype, shape, room, adapter)
                overheads = self._measure_layers(device, architecture, backend, adapter, (bandwidth, flops[0][1]), room)
            except torch.OutOfMemoryError as error:
                raise OutOfDeviceMemoryError(
                    f"{device.name}: its speed cannot be measured, because {format_bytes(room)} of its memory could "
                    f"not be allocated: {str(error).splitlines()[0]}"
                ) from error
        profile = DeviceProfile(device.name, bandwidth, flops, overheads.layer_s, overheads.step_s)
        logger.info(
            "device measured",
            device=device.name,
            gigabytes_s=round(bandwidth / 1e9, 2),
            gigaflops={rows: round(rate / 1e9, 1) for rows, rate in flops},
            layer_overhead_us=round(overheads.layer_s * 1e6, 1),
            step_overhead_us=round(overheads.step_s * 1e6, 1),
        )
        return profile

    def _measure_products(
        self, device: Device, dtype: torch.dtype, shape: LayerShape, room: int, adapter: LinearAdapter | None
    ) -> tuple[float, tuple[tuple[int, float], ...]]:
        products = Products(device, dtype, shape.hidden, shape.intermediate, room, adapter or _as_it_is)
        with torch.inference_mode():
            bandwidth = products.bandwidth_bytes_s(_BANDWIDTH_SHARE * self._budget_s)
            points: list[tuple[int, float]] = []
            expected = 2 * bandwidth / dtype.itemsize
            for rows in ROWS:
                expected = products.flops(rows, expected, _FLOPS_SHARE * self._budget_s / len(ROWS))
                points.append((rows, expected))
            return bandwidth, self._without_dips(products, points)

    def _without_dips(self, products: Products, points: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
        """More rows are seldom slower. Where they seem to be, something else may have run: they are measured again, so
        that it does not stay in the cache."""
        sound: list[tuple[int, float]] = []
        for rows, rate in points:
            if rate < DIP * max((before for _, before in sound), default=0.0):
                rate = max(rate, products.flops(rows, rate, _FLOPS_SHARE * self._budget_s / len(ROWS)))
            sound.append((rows, rate))
        return tuple(sound)

    def _measure_layers(
        self,
        device: Device,
        architecture: Architecture,
        backend: AttentionBackend,
        adapter: LinearAdapter | None,
        speed: tuple[float, float],
        room: int,
    ) -> Overheads:
        """What a layer takes at one token beyond what `speed` (bytes/s, operations/s) accounts for."""
        layer_bytes = max(measure_bytes(architecture).layers)
        count = measure.choose_layer_count(architecture, layer_bytes, device, room)
        if count == 0:
            logger.warning(
                "overheads are taken as 0: a layer does not fit",
                device=device.name, layer=format_bytes(layer_bytes), room=format_bytes(room),
            )  # fmt: skip
            return Overheads(0.0, 0.0)
        layers = RandomLayers(architecture, device, count, backend, adapter or _as_it_is)
        roofline_s = max(layers.layer_bytes / speed[0], layers.layer_flops / speed[1])
        with torch.inference_mode():
            return layers.overheads(roofline_s, _OVERHEAD_SHARE * self._budget_s)

    def _torch_threads(self, dtype: torch.dtype, adapter: LinearAdapter | None) -> int:
        """As the engine has it: one where the native kernels do all products."""
        return 1 if adapter is not None and do_all_products(dtype) else self._cpu_threads

    def _link(self, src: Device, dst: Device, refresh: bool, known: dict[str, LinkProfile]) -> LinkProfile:
        method = self._transfer.method(src, dst)
        emulated = self._settings.devices.sim_link
        if emulated is not None and "sim" in (src.kind, dst.kind):
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
        profile = known.get(key) or (None if refresh else self.store.load_link(facts, method))
        if profile is None:
            time_transfer = functools.partial(self._time_transfer, src, dst)
            profile = self._measure_link(src, src.name, dst.name, method, time_transfer)
            self.store.save_link(facts, profile)
        known[key] = profile
        return profile

    def _end(self, device: Device) -> Facts:
        """One end of a link: cards of one model may sit in slots that differ."""
        uuid = None
        if device.kind in ("cuda", "rocm"):
            uuid = str(getattr(torch.cuda.get_device_properties(device.torch_device), "uuid", device.torch_device))
        return device_facts(device, self._cpu_threads) | {"uuid": uuid}

    def _measure_link(
        self, device: Device, src: str, dst: str, method: str, time_transfer: Callable[[int], float]
    ) -> LinkProfile:
        """From the times of a small and of a large transfer, which end when the data has arrived."""
        with _computing_as_served(device, 1):  # the other threads are with the stages that compute meanwhile
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
        return self._time_link(lambda: self._transfer.send(payload, src, dst))

    def _time_link(self, transfer: Callable[[], object]) -> float:
        host = torch.device("cpu")  # the transfer has waited for the devices: the wall clock is theirs
        return measure.time_runs(transfer, host, _LINK_SHARE * self._budget_s)


def _as_it_is(model: nn.Module) -> None:
    """Devices whose modules are used as they are."""


@contextmanager
def _computing_as_served(device: Device, torch_threads: int) -> Iterator[None]:
    """The device is current and torch has as many threads as in the engine; afterwards its memory is given back."""
    at: Any = torch.cuda.device(device.torch_device) if device.kind in ("cuda", "rocm") else nullcontext()
    threads = torch.get_num_threads()
    torch.set_num_threads(torch_threads)
    try:
        with at:
            yield
    finally:
        torch.set_num_threads(threads)
        if device.kind in ("cuda", "rocm"):
            torch.cuda.empty_cache()
        elif device.kind == "mps":
            torch.mps.empty_cache()
