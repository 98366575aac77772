"""What is in memory: devices, leases, tiers and their blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from core.kv_cache.paged_kv_cache import PagedKVCache
from core.metrics import LendingState, TierMoves, TierState
from core.tiers import Tier

if TYPE_CHECKING:
    from core.engine.model_engine import ModelEngine
    from core.inference_pipeline import InferencePipeline
    from core.lending.overflow import OverflowView
    from core.tiers.kv_tiers import KVTiers


def memory_view(pipeline: InferencePipeline, blocks: int = 0) -> dict[str, Any]:
    """`/api/memory`: bytes per device, leases, tiers; with `blocks`, as many of each tier's hottest blocks."""
    engine = pipeline.current_engine
    if engine is None:
        return {"devices": [], "kv_blocks": None, "stages": [], "leases": [], "decisions": {}, "tiers": []}
    view, stats = _overflow(engine), engine.batcher.stats
    tiers = engine.memory.tiers
    return {
        "devices": _devices(engine, view),
        "kv_blocks": {
            "size_tokens": engine.kv.block_size,
            "total": engine.kv.pool.num_blocks,
            "with_memory": stats.blocks_total,
            "free": stats.blocks_free,
            "cached": stats.blocks_cached,
        },
        "stages": [] if view is None else [dict(stage) for stage in view.stages],
        "leases": [] if view is None else [dict(lease) for lease in view.leases],
        "decisions": {} if view is None else dict(view.decisions),
        "tiers": [] if tiers is None else _tiers(tiers, blocks),
    }


def _overflow(engine: ModelEngine) -> OverflowView | None:
    return None if engine.memory.overflow is None else engine.memory.overflow.view


def _devices(engine: ModelEngine, view: OverflowView | None) -> list[dict[str, Any]]:
    found = []
    for device in engine.plan.devices:
        budget = engine.budgets[device.name]
        used = budget.used_by_purpose()
        own, lent = used.get(PagedKVCache.PURPOSE, 0), used.get(PagedKVCache.LENT, 0)
        leases = [] if view is None else view.leases
        found.append(
            {
                "name": device.name,
                "limit_bytes": device.memory_limit_bytes,
                "weights_bytes": used.get("weights", 0),
                "own_kv_bytes": own,
                "lent_bytes": lent,
                "borrowed_bytes": sum(lease["bytes"] for lease in leases if lease["borrower"] == device.name),
                "other_bytes": sum(used.values()) - own - lent - used.get("weights", 0),
                "free_bytes": budget.free_bytes,
            }
        )
    return found


def _tiers(tiers: KVTiers, blocks: int) -> list[dict[str, Any]]:
    stats = tiers.memory.stats()
    return [
        {
            "tier": tier.tier.name,
            "medium": tier.medium,
            "codec": tier.codec,
            "blocks": tier.blocks,
            "used_bytes": tier.bytes,
            "capacity_bytes": tier.capacity_bytes,
            "hits": tier.hits,
            "misses": tier.misses,
            "damaged": tier.damaged,
            "stopped": tier.stopped,
            "mean_hotness": round(tier.mean_hotness, 4),
            "read_bytes_per_second": None if tier.speed is None else round(tier.speed.read_bytes_s),
            "write_bytes_per_second": None if tier.speed is None else round(tier.speed.write_bytes_s),
            "moves": [
                {"kind": kind, "from": source.name, "to": None if target is None else target.name, "blocks": count}
                for (kind, source, target), count in stats.moves.items()
                if tier.tier in (source, target)
            ],
            "hottest": [
                {"block": info.hash.hex(), "hotness": round(info.hotness, 4), "pinned": info.pinned}
                for info in (tiers.memory.blocks(tier.tier, blocks) if blocks else ())
            ],
        }
        for tier in stats.tiers
    ]


def lending_state(engine: ModelEngine) -> LendingState:
    """What metrics show of the lending pool."""
    view = _overflow(engine)
    if view is None:
        return LendingState()
    stats = view.stats
    return LendingState(
        borrows_total=stats.borrows,
        reclaims_total={urgency.label: count for urgency, count in stats.reclaims.items()},
        bytes_lent_total=stats.bytes_lent_total,
        active_leases=stats.active_leases,
        capacity_bytes=stats.capacity_bytes,
    )


def tier_states(engine: ModelEngine) -> tuple[tuple[TierState, ...], tuple[TierMoves, ...], int]:
    """What metrics show of the tiers, and how many writes were given up. Moves to and from lent memory are counted as
    between L1 and L2."""
    view, tiers = _overflow(engine), engine.memory.tiers
    states: tuple[TierState, ...] = ()
    moves: tuple[TierMoves, ...] = ()
    dropped = 0
    if tiers is not None:
        stats = tiers.memory.stats()
        states, moves = stats.for_metrics()
        dropped = stats.dropped_writes
    if view is not None:
        moves += (
            TierMoves("demotion", Tier.L1.name, Tier.L2.name, view.moved_out),
            TierMoves("promotion", Tier.L2.name, Tier.L1.name, view.moved_home),
        )
    return states, moves, dropped
