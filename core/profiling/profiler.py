"""Profiles of devices and links, for placement: from the store where they are known, else by short real runs."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from core.config import Settings
from core.costs import DeviceProfile, Sharing, emulated_profile
from core.devices import Device, format_bytes
from core.devices.exhaustion import is_out_of_memory
from core.devices.probe import read_memory
from core.errors import OutOfDeviceMemoryError
from core.execution.attention.interface import AttentionBackend
from core.execution.attention.select import LinearAdapter, select_attention
from core.execution.native import do_all_products
from core.execution.threads import CpuThreads
from core.logs import get_logger
from core.models.architecture import Architecture
from core.profiling.device_speed import layer_shape, measure_speed
from core.profiling.layer_times import SHARING_ROWS, measure_sharing
from core.profiling.link_profiler import LinkProfiler
from core.profiling.measure import computing_as_served
from core.profiling.noise import Noise, look_at
from core.profiling.profile_store import device_facts, kernel_digest, key_of
from core.profiling.random_layers import SHORT, RandomLayers, choose_layer_count
from core.transfer import TransferManager

logger = get_logger(__name__)

DEVICE_BUDGET_S = 2.0
"""Seconds of measuring per device, without what is compiled and filled for it."""

_Selected = tuple[AttentionBackend, LinearAdapter | None]  # as `select_attention` gives it
_ROOM_SHARE = 2  # measuring takes up to half of what may be used


class LayerProfiler(LinkProfiler):
    """Measures devices and links, once each: results are kept under `runtime.cache_dir / "profiles"`.

    Measure while nothing else computes on the devices. `transfer` counts what is sent for it. CPU devices compute with
    `cpu_threads` threads. `budget_s` seconds are spent per device; less gives rougher numbers.
    """

    def __init__(
        self, settings: Settings, transfer: TransferManager, cpu_threads: int, *, budget_s: float = DEVICE_BUDGET_S
    ) -> None:
        super().__init__(settings, transfer, cpu_threads, budget_s)
        self.noise: dict[str, Noise] = {}
        """By logical device, the noise in which its profile was measured."""

    def devices(
        self, devices: Sequence[Device], architecture: Architecture, *, refresh: bool = False, retry: bool = False
    ) -> tuple[DeviceProfile, ...]:
        """A profile per device, for layers of the architecture in its dtype.

        Parts of one physical device share one measurement of a part alone, and another one of all of them at once.
        Emulated devices have the speed that they were given, and nothing is measured. `refresh` measures what the store
        already has; `retry` what was measured in noise, if the device is idle now. Raises `OutOfDeviceMemoryError` for
        a device without memory to measure in.
        """
        known: dict[str, DeviceProfile] = {}
        profiles = [self._device(device, architecture, refresh, retry, known) for device in devices]
        processors = defaultdict[str, list[Device]](list)
        for device in devices:
            if device.speed is None:
                processors[device.torch_device].append(device)
        several = {processor: parts for processor, parts in processors.items() if len(parts) > 1}
        sharing = {processor: self._sharing(parts, architecture, refresh) for processor, parts in several.items()}
        return tuple(
            replace(profile, sharing=sharing.get(device.torch_device) if device.speed is None else None)
            for device, profile in zip(devices, profiles, strict=True)
        )

    def _device(
        self, device: Device, architecture: Architecture, refresh: bool, retry: bool, known: dict[str, DeviceProfile]
    ) -> DeviceProfile:
        if device.speed is not None:
            return emulated_profile(device.name, device.speed.bandwidth_bytes_s, device.speed.flops)
        selected = select_attention(device, self._settings, self._cpu_threads)
        facts = self._facts(device, architecture, selected)
        key = key_of(facts)
        kept = self.store.load("noise", facts)
        noise = Noise(0.0) if kept is None else Noise(**kept)
        if key not in known:
            stored = None if refresh else self.store.load("device", facts)
            if stored is None or (retry and noise.is_much):
                now = look_at([device])[device.torch_device]
                if stored is None or not now.is_much:
                    noise, stored = now, None
            if stored is None:
                known[key] = self._measure_device(device, architecture, selected)
                self.store.save("device", facts, known[key])
                self.store.save("noise", facts, noise)
            else:
                known[key] = DeviceProfile(device.name, **stored)
        self.noise[device.name] = noise
        return replace(known[key], name=device.name)

    def _facts(self, device: Device, architecture: Architecture, selected: _Selected) -> dict[str, Any]:
        backend, adapter = selected
        return device_facts(device, self._cpu_threads) | {
            "torch": torch.__version__,
            "dtype": str(architecture.dtype).removeprefix("torch."),
            "shape": layer_shape(architecture),
            "attention": backend.name,
            "native_kernels": None if adapter is None else adapter.kernels.instructions,
            "kernels": kernel_digest(),
        }

    def _sharing(self, parts: Sequence[Device], architecture: Architecture, refresh: bool) -> Sharing | None:
        """What these parts of one processor cost each other; None if there is no room to measure it."""
        threads = CpuThreads(self._cpu_threads, len(parts))
        selected = [select_attention(device, self._settings, threads) for device in parts]
        facts = self._facts(parts[0], architecture, selected[0]) | {
            "parts": len(parts),
            "threads_together": threads.together if parts[0].is_main_memory else None,
        }
        stored = None if refresh else self.store.load("sharing", facts)
        if stored is not None:
            return Sharing(parts[0].torch_device, len(parts), **stored)
        sharing = self._measure_sharing(parts, architecture, selected, threads)
        if sharing is not None:
            self.store.save("sharing", facts, sharing)
        return sharing

    def _measure_sharing(
        self, parts: Sequence[Device], architecture: Architecture, selected: Sequence[_Selected], threads: CpuThreads
    ) -> Sharing | None:
        held = read_memory(parts)
        room = min(held[0].free_bytes // len(parts), *(memory.usable_bytes for memory in held)) // _ROOM_SHARE
        count = choose_layer_count(architecture, parts[0], room, max(SHARING_ROWS) * SHORT)
        if count == 0:
            logger.warning("parts are taken to cost each other nothing: a layer does not fit", device=parts[0].name)
            return None
        with self._within(parts[0], room, architecture.dtype, selected[0][1]):
            reading, computing = self._time_together(parts, architecture, selected, threads, count)
        names = [device.name for device in parts]
        logger.info("parts measured together", devices=names, reading=round(reading, 2), computing=round(computing, 2))
        return Sharing(parts[0].torch_device, len(parts), reading, computing)

    def _time_together(
        self, parts: Sequence[Device], architecture: Architecture, selected: Sequence[_Selected], threads: CpuThreads,
        count: int,
    ) -> tuple[float, float]:  # fmt: skip
        """Apart, so that all layers are gone when it returns and what they took can be given back."""
        layers = [
            RandomLayers(architecture, device, count, backend, adapt or _as_it_is, max(SHARING_ROWS) * SHORT)
            for device, (backend, adapt) in zip(parts, selected, strict=True)
        ]
        torch_threads = min(threads.together, self._torch_threads(architecture.dtype, selected[0][1]))
        prepare = functools.partial(torch.set_num_threads, torch_threads)
        return measure_sharing(layers, prepare, threads.overlap, len(parts) * self._budget_s)

    def _measure_device(self, device: Device, architecture: Architecture, selected: _Selected) -> DeviceProfile:
        (memory,) = read_memory([device])
        (backend, adapter), room = selected, memory.usable_bytes // _ROOM_SHARE
        with self._within(device, room, architecture.dtype, adapter):
            profile = measure_speed(device, architecture, backend, adapter or _as_it_is, room, self._budget_s)
        logger.info(
            "device measured",
            device=device.name,
            gigabytes_s=round(profile.bandwidth_bytes_s / 1e9, 2),
            gigaflops={rows: round(rate / 1e9, 1) for rows, rate in profile.flops},
            kv_gigabytes_s=round(profile.kv_bytes_s / 1e9, 2),
            layer_overhead_us=round(profile.layer_overhead_s * 1e6, 1),
            row_overhead_us=round(profile.row_overhead_s * 1e6, 1),
            step_overhead_us=round(profile.step_overhead_s * 1e6, 1),
        )
        return profile

    @contextmanager
    def _within(self, device: Device, room: int, dtype: torch.dtype, adapter: LinearAdapter | None) -> Iterator[None]:
        """Computing as served, in `room` bytes; that they are not there after all is a typed error."""
        try:
            with computing_as_served(device, self._torch_threads(dtype, adapter)):
                yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfDeviceMemoryError(
                f"{device.name}: its speed cannot be measured, because {format_bytes(room)} of its memory could "
                f"not be allocated: {str(error).splitlines()[0]}"
            ) from error

    def _torch_threads(self, dtype: torch.dtype, adapter: LinearAdapter | None) -> int:
        """As the engine has it: one where the native kernels do all products."""
        if adapter is not None and do_all_products(dtype, adapter.kernels.instructions):
            return 1
        return self._cpu_threads


def _as_it_is(model: nn.Module) -> None:
    """Devices whose modules are used as they are."""
