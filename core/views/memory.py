"""What is in memory, and moving it by call: devices, leases, tiers and their blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from core.errors import ConflictError, InvalidRequestError, NotFoundError
from core.kv_cache.paged_kv_cache import PagedKVCache
from core.lending import Urgency, VRAMLendingPool
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
        return {
            "devices": [],
            "kv_blocks": None,
            "stages": [],
            "leases": [],
            "decisions": {},
            "tiers": [],
            "tier_troubles": {},
        }
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
        "tier_troubles": {} if tiers is None else tier_troubles(tiers),
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


def tier_troubles(tiers: KVTiers) -> dict[str, str]:
    """Why tiers that were asked for are missing or take no blocks at the moment, by name."""
    return {tier.name: reason for tier, reason in tiers.memory.troubles().items()}


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


def move_block(pipeline: InferencePipeline, block: str, *, up: bool) -> None:
    """Bring a block of a lower tier to main memory, or send one of main memory to the tier below.

    Raises `InvalidRequestError` for what is no block, `NotFoundError` where there are no tiers or no such block,
    `ConflictError` if it cannot move now.
    """
    try:
        digest = bytes.fromhex(block)
    except ValueError as error:
        raise InvalidRequestError("A block is named by 32 hexadecimal digits.", param="block") from error
    tiers = pipeline.engine.memory.tiers
    if tiers is None:
        raise NotFoundError("No tiers below the devices are in use (memory.host_bytes, memory.disk_path).")
    where = tiers.memory.find([digest], record=False)
    if not where:
        raise NotFoundError(f"No tier holds block {block}.")
    if not (tiers.memory.promote(digest) if up else tiers.memory.demote(digest)):
        raise ConflictError(f"Block {block} is in {where[0].name} and cannot move {'up' if up else 'down'} now.")


def reclaim(pipeline: InferencePipeline, device: str, nbytes: int | None, urgency: str) -> int:
    """Have a device ask back what it lent. Returns how many bytes will come back.

    Raises `NotFoundError` for an unknown device or where nothing is lent, `UnavailableError` if the engine does not
    come to it.
    """
    engine = pipeline.engine
    lending = _lending(engine, device)
    level = Urgency[urgency.upper()]
    return engine.batcher.call_within(lambda: lending.request_reclaim(device, nbytes, level))


def lend_again(pipeline: InferencePipeline, device: str) -> int:
    """Have a device lend again that took everything back. Returns the bytes that all devices can lend now.

    Raises as `reclaim` does.
    """
    engine = pipeline.engine
    lending = _lending(engine, device)

    def reopen() -> int:
        lending.reopen(device)
        return lending.capacity_bytes()

    return engine.batcher.call_within(reopen)


def _lending(engine: ModelEngine, device: str) -> VRAMLendingPool:
    overflow = engine.memory.overflow
    if overflow is None or device not in {each.name for each in engine.plan.devices}:
        raise NotFoundError(f"{device} lends no memory.")
    return overflow.lending


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
