"""What Prometheus reads at a scrape."""

from __future__ import annotations

from core.engine.model_engine import ModelEngine
from core.metrics import DeviceMemory, KVPages, LendingState, MetricsSnapshot, StageWork, TierMoves, TierState
from core.tiers import Tier
from core.views.memory import overflow_of


def metrics_snapshot(engine: ModelEngine | None) -> MetricsSnapshot:
    """The engine's state now; empty without one."""
    if engine is None:
        return MetricsSnapshot()
    stats = engine.batcher.stats
    used, alive_s = stats.blocks_total - stats.blocks_free, max(engine.alive_s, 1e-9)
    stages = list(zip(engine.plan.placement.stages, engine.stages, strict=True))
    tiers, tier_moves, dropped = _tier_states(engine)
    return MetricsSnapshot(
        tiers=tiers,
        tier_moves=tier_moves,
        tier_dropped_writes_total=dropped,
        lending=_lending_state(engine),
        devices=tuple(
            DeviceMemory(
                device.name,
                device.kind,
                device.index,
                engine.budgets[device.name].used_bytes,
                device.memory_limit_bytes,
            )
            for device in engine.plan.devices
        ),
        kv_pages=tuple(KVPages(plan.device_name, used, stats.blocks_free) for plan, _ in stages),
        batch_size=stats.batch_size,
        requests_running=stats.running,
        requests_waiting=stats.waiting,
        throughput_tok_s=stats.tokens_per_s,
        preemptions_total=stats.preemptions,
        prefix_cache_queries_total=stats.queried_tokens,
        prefix_cache_hits_total=stats.hit_tokens,
        kv_evictions_total=stats.evictions,
        stages=tuple(
            StageWork(f"{i}:{plan.device_name}", min(1.0, s.busy_s / alive_s), s.forwards, s.busy_s, s.predicted_s)
            for i, (plan, s) in enumerate(stages)
        ),
    )


def _lending_state(engine: ModelEngine) -> LendingState:
    view = overflow_of(engine)
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


def _tier_states(engine: ModelEngine) -> tuple[tuple[TierState, ...], tuple[TierMoves, ...], int]:
    """Tiers, moves and how many writes were given up. Moves to and from lent memory count as between L1 and L2."""
    view, tiers = overflow_of(engine), engine.memory.tiers
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
