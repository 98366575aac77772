"""What is in memory: devices, leases, tiers and their blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from core.devices import Device
from core.engine.model_engine import ModelEngine
from core.kv_cache.paged_kv_cache import PagedKVCache
from core.lending.overflow import LeaseView, OverflowView, StagePagesView
from core.tiers.kv_tiers import KVTiers
from core.tiers.records import MemoryStats, TierStats
from core.views.render import view_of


@dataclass(frozen=True, slots=True)
class DeviceMemoryView:
    """Who holds a device's memory. The parts and what is free add up to the limit; `borrowed_bytes` lie elsewhere."""

    name: str
    limit_bytes: int
    weights_bytes: int
    own_kv_bytes: int
    lent_bytes: int
    borrowed_bytes: int
    other_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class TierView:
    """One tier below the devices. Speeds are None until they are measured; `stopped` says why nothing is written.

    `moves` are blocks that went from one tier to another since the start, to None where no tier keeps them; `hottest`
    are blocks by the hexadecimal digits of their hashes.
    """

    tier: str
    medium: str
    codec: str
    blocks: int
    used_bytes: int
    capacity_bytes: int
    hits: int
    misses: int
    damaged: int
    stopped: str | None
    mean_hotness: float
    read_bytes_per_second: int | None
    write_bytes_per_second: int | None
    moves: tuple[Mapping[str, object], ...]
    hottest: tuple[Mapping[str, object], ...]


@dataclass(frozen=True, slots=True)
class MemoryView:
    """All memory of the loaded model; empty without one. Of all `kv_blocks`, pages back those `with_memory`.
    `decisions` counts what became of blocks that were away when there was room at home, `tier_troubles` says why tiers
    that were asked for are missing or take no blocks now."""

    devices: tuple[DeviceMemoryView, ...] = ()
    kv_blocks: Mapping[str, int] | None = None
    stages: tuple[StagePagesView, ...] = ()
    leases: tuple[LeaseView, ...] = ()
    decisions: Mapping[str, int] = field(default_factory=dict)
    tiers: tuple[TierView, ...] = ()
    tier_troubles: Mapping[str, str] = field(default_factory=dict)


def memory_view(engine: ModelEngine | None, blocks: int = 0) -> MemoryView:
    """`/api/memory`: bytes per device, leases, tiers; with `blocks`, as many of each tier's hottest blocks."""
    if engine is None:
        return MemoryView()
    lent, stats, tiers = overflow_of(engine), engine.batcher.stats, engine.memory.tiers
    leases = () if lent is None else lent.leases
    return MemoryView(
        devices=tuple(_device(engine, device, leases) for device in engine.plan.devices),
        kv_blocks={
            "size_tokens": engine.kv.block_size,
            "total": engine.kv.pool.num_blocks,
            "with_memory": stats.blocks_total,
            "free": stats.blocks_free,
            "cached": stats.blocks_cached,
        },
        stages=() if lent is None else lent.stages,
        leases=leases,
        decisions={} if lent is None else dict(lent.decisions),
        tiers=() if tiers is None else _tiers(tiers, blocks),
        tier_troubles=tier_troubles(engine),
    )


def overflow_of(engine: ModelEngine) -> OverflowView | None:
    """What is lent; None where stages hold all of their pages themselves."""
    return None if engine.memory.overflow is None else engine.memory.overflow.view


def _device(engine: ModelEngine, device: Device, leases: tuple[LeaseView, ...]) -> DeviceMemoryView:
    used = engine.budgets[device.name].used_by_purpose()
    weights, own, lent = (used.get(purpose, 0) for purpose in ("weights", PagedKVCache.PURPOSE, PagedKVCache.LENT))
    return DeviceMemoryView(
        name=device.name,
        limit_bytes=device.memory_limit_bytes,
        weights_bytes=weights,
        own_kv_bytes=own,
        lent_bytes=lent,
        borrowed_bytes=sum(lease.bytes for lease in leases if lease.borrower == device.name),
        other_bytes=sum(used.values()) - own - lent - weights,
        free_bytes=device.memory_limit_bytes - sum(used.values()),
    )


def tier_troubles(engine: ModelEngine) -> dict[str, str]:
    """Why tiers that were asked for are missing or take no blocks at the moment, by name."""
    return {tier.name: reason for tier, reason in engine.memory.below.troubles().items()}


def _tiers(tiers: KVTiers, blocks: int) -> tuple[TierView, ...]:
    stats = tiers.memory.stats()
    return tuple(_tier(tiers, stats, tier, blocks) for tier in stats.tiers)


def _tier(tiers: KVTiers, stats: MemoryStats, tier: TierStats, blocks: int) -> TierView:
    hottest = tiers.memory.blocks(tier.tier, blocks) if blocks else ()
    return view_of(
        TierView,
        tier,
        tier=tier.tier.name,
        used_bytes=tier.bytes,
        mean_hotness=round(tier.hotness.mean, 4),
        read_bytes_per_second=None if tier.speed is None else round(tier.speed.read_bytes_s),
        write_bytes_per_second=None if tier.speed is None else round(tier.speed.write_bytes_s),
        moves=tuple(
            {"kind": kind, "from": source.name, "to": None if target is None else target.name, "blocks": count}
            for (kind, source, target), count in stats.moves.items()
            if tier.tier in (source, target)
        ),
        hottest=tuple(
            {"block": info.hash.hex(), "hotness": round(info.hotness, 4), "pinned": info.pinned} for info in hottest
        ),
    )
