"""What devices are doing: memory by purpose, what of it is free KV, and the last readings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from core.devices import Device
from core.devices.readings import DeviceReading
from core.engine.model_engine import ModelEngine
from core.kv_cache.paged_kv_cache import PagedKVCache
from core.views.memory import overflow_of
from core.views.state import ServiceState

Readings = Mapping[str, DeviceReading]
"""The last ones, by device."""


@dataclass(frozen=True, slots=True)
class DeviceView:
    """A logical device, its limit, and what is held on it, by purpose. Of what is held, `free_kv_bytes` are pages of
    KV that no request uses now. `reading` is what the physical device said last, None if it was not asked yet."""

    name: str
    index: int
    backend: str
    limit_bytes: int
    used_bytes: int
    used_by_purpose: Mapping[str, int]
    free_kv_bytes: int
    reading: DeviceReading | None


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of a device that are in use, free KV pages left out, and that there are."""

    used_bytes: int
    total_bytes: int


def device_views(engine: ModelEngine | None, service: ServiceState) -> tuple[DeviceView, ...]:
    """`/api/gpu`: the devices that the model was given, whether a stage is there or not."""
    if engine is None:
        return ()
    free_kv = free_kv_bytes(engine)
    found = []
    for device in engine.plan.devices:
        used = engine.budgets[device.name].used_by_purpose()
        found.append(
            DeviceView(
                device.name, device.index, device.kind, device.memory_limit_bytes, sum(used.values()), used,
                free_kv.get(device.name, 0), service.readings.get(device.name),
            )
        )  # fmt: skip
    return tuple(found)


def device_memory(engine: ModelEngine, readings: Readings) -> dict[str, DeviceMemory]:
    """How full devices are, by name. A card that is used as a whole counts with everybody's use of it; a part of one, a
    processor or an emulated card counts within its limit."""
    free_kv, found = free_kv_bytes(engine), {}
    for device in engine.plan.devices:
        used, total = engine.budgets[device.name].used_bytes, device.memory_limit_bytes
        reading = readings.get(device.name)
        if reading is not None and _is_whole_card(device):
            used, total = reading.used_bytes or used, reading.total_bytes or total
        found[device.name] = DeviceMemory(max(0, used - free_kv.get(device.name, 0)), total)
    return found


def _is_whole_card(device: Device) -> bool:
    return not device.computes_on_cpu and "#" not in device.name


def free_kv_bytes(engine: ModelEngine) -> dict[str, int]:
    """Bytes of KV pages by device that no request uses, cached ones included. Where some of a stage's pages are
    borrowed, those in use are taken to be spread evenly over its own and the borrowed ones."""
    stats, lent = engine.batcher.stats, overflow_of(engine)
    used_blocks = stats.blocks_total - stats.blocks_free
    borrowing = {view.device: view for view in lent.stages} if lent is not None else {}
    share: dict[str, float] = {}
    for stage in engine.plan.placement.stages:
        view = borrowing.get(stage.device_name)
        pages = stats.blocks_total if view is None else view.local_pages + view.borrowed_pages
        share[stage.device_name] = max(0.0, 1.0 - used_blocks / pages) if pages else 0.0
    free: dict[str, float] = {}
    for name, part in share.items():
        free[name] = part * engine.budgets[name].used_by_purpose().get(PagedKVCache.PURPOSE, 0)
    for lease in lent.leases if lent is not None else ():
        free[lease.lender] = free.get(lease.lender, 0.0) + share[lease.borrower] * lease.bytes
    return {name: round(nbytes) for name, nbytes in free.items()}
