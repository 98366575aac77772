"""What monitoring shows of the pipeline: plain dictionaries from snapshots, never from the engine's live state."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import psutil

from core.batching.stats import BatcherStats
from core.metrics.snapshot import DeviceMemory, KVPages, MetricsSnapshot, StageWork
from core.placement.predict import predict_rate
from core.views.memory import lending_state, memory_view, tier_states, tier_troubles

if TYPE_CHECKING:
    from core.engine.model_engine import ModelEngine
    from core.inference_pipeline import InferencePipeline

_LOW_DISK_BYTES = 256 * 1024 * 1024
_LOW_MEMORY_BYTES = 128 * 1024 * 1024


def _check(ok: bool, detail: str, *, warn: bool = False) -> dict[str, str]:
    return {"status": ("degraded" if warn else "ok") if ok else "error", "detail": detail}


def health(pipeline: InferencePipeline) -> dict[str, Any]:
    """`{"status", "checks": {name: {"status", "detail"}}}`; the worst check is the whole's status."""
    engine = pipeline.current_engine
    checks = {"engine": _engine_check(pipeline, engine), "model": _model_check(pipeline, engine)}
    checks["devices"] = _devices_check(engine)
    available = psutil.virtual_memory().available
    checks["memory"] = _check(True, f"{available} bytes of main memory available", warn=available < _LOW_MEMORY_BYTES)
    if engine is not None:
        stats = engine.batcher.stats
        used = stats.blocks_total - stats.blocks_free
        if engine.memory.tiers is not None:
            troubles = tier_troubles(engine.memory.tiers)
            detail = "; ".join(f"{name} is not used: {reason}" for name, reason in troubles.items())
            checks["tiers"] = _check(True, detail or "all tiers take blocks", warn=bool(troubles))
        checks["kv_cache"] = _check(True, f"{used} of {stats.blocks_total} blocks in use")
    free = shutil.disk_usage(pipeline.settings.runtime.cache_dir.anchor or ".").free
    checks["disk"] = _check(True, f"{free} bytes free", warn=free < _LOW_DISK_BYTES)
    order = ("ok", "degraded", "error")
    worst = max((check["status"] for check in checks.values()), key=order.index)
    return {"status": worst, "checks": checks}


def _engine_check(pipeline: InferencePipeline, engine: ModelEngine | None) -> dict[str, str]:
    if engine is None:
        return _check(False, "a model is being loaded" if pipeline.loading else "no engine: no model is loaded")
    batcher = engine.batcher
    if not batcher.alive:
        return _check(False, f"the engine thread has ended: {batcher.error!r}")
    state = batcher.breaker.state
    if state != "closed":
        return _check(state != "open", f"circuit breaker is {state}: {batcher.breaker.last_error}", warn=True)
    return _check(True, f"{batcher.stats.steps} steps, {batcher.stats.failed_steps} failed")


def _model_check(pipeline: InferencePipeline, engine: ModelEngine | None) -> dict[str, str]:
    ready, reason = pipeline.ready()
    if engine is None or not ready:
        return _check(False, reason)
    return _check(True, f"{engine.model.name} has produced tokens")


def _devices_check(engine: ModelEngine | None) -> dict[str, str]:
    if engine is None:
        return _check(True, "no device in use")
    try:
        for budget in engine.budgets.values():
            budget.check_invariants()
    except AssertionError as error:
        return _check(False, str(error))
    names = ", ".join(engine.budgets)
    return _check(True, f"within budget: {names}")


def pipeline_status(pipeline: InferencePipeline) -> dict[str, Any]:
    """Model, placement, stages and subsystems."""
    engine = pipeline.current_engine
    ready, reason = pipeline.ready()
    result: dict[str, Any] = {"ready": ready, "state": reason, "subsystems": health(pipeline)["checks"]}
    if engine is None:
        return result | {"model": None, "stages": []}
    model, placement = engine.model, engine.plan.placement
    result["model"] = {
        "name": model.name,
        "aliases": list(model.aliases),
        "dtype": model.dtype,
        "parameters": model.num_parameters,
        "max_model_len": model.max_model_len,
        "load_seconds": round(engine.load_s, 3),
    }
    result["placement"] = {"strategy": placement.strategy, "unused_devices": list(placement.unused_devices)}
    result["kv_cache"] = {"tokens": engine.kv.capacity_tokens, "block_size": engine.kv.block_size}
    result["memory"] = memory_view(pipeline)
    result["stages"] = [
        {
            "index": index,
            "device": plan.device_name,
            "layers": [plan.first_layer, plan.last_layer - 1],
            "weight_bytes": stage.weight_bytes,
            "streamed_layers": list(plan.streamed_layers),
            "streamed_bytes": plan.streamed_bytes,
            "stream_slot_bytes": plan.slot_bytes,
            "stream_wait_seconds": round(stage.stream.wait_s, 3) if stage.stream is not None else 0.0,
            "kv_bytes": stage.kv.nbytes if stage.kv is not None else 0,
            "workspace_bytes": plan.workspace_bytes,
            "limit_bytes": plan.limit_bytes,
            "attention": backend,
            "forwards": stage.forwards,
            "seconds_per_forward": round(stage.busy_s / stage.forwards, 6) if stage.forwards else None,
            "busy_seconds": round(stage.busy_s, 3),
            "predicted_seconds": round(stage.predicted_s, 3) if engine.plan.is_measured else None,
        }
        for index, (plan, stage, backend) in enumerate(
            zip(placement.stages, engine.stages, engine.backends, strict=True)
        )
    ]
    result["prediction"] = _prediction(engine)
    result["transfers"] = [
        {
            "method": link[0], "src": link[1], "dst": link[2], "ops": s.ops, "bytes": s.bytes, "seconds": s.seconds,
            "bytes_per_second": round(s.bytes / s.seconds) if s.seconds else None,
        }
        for link, s in pipeline.transfer.stats().items()
    ]  # fmt: skip
    return result


def _prediction(engine: ModelEngine) -> dict[str, Any] | None:
    """What the cost model expects of the placement, beside what is measured now; None where speeds are not known."""
    plan, stats = engine.plan, engine.batcher.stats
    if plan.prediction is None:
        return None
    now = None
    if stats.running:
        rate = predict_rate(plan.placement, plan.request, stats.running, plan.request.context, plan.pooled)
        now = round(rate.tok_s, 2)
    return {
        "context": plan.prediction.context,
        "floor_seconds": plan.prediction.floor_s,
        "tokens_per_second": {str(rate.streams): round(rate.tok_s, 2) for rate in plan.prediction.rates},
        "now": {"streams": stats.running, "predicted": now, "measured": round(stats.tokens_per_s, 2)},
    }


def queue_status(pipeline: InferencePipeline) -> dict[str, Any]:
    """Queue depth and limit, and the circuit breaker."""
    engine = pipeline.current_engine
    limit = pipeline.settings.engine.max_queue
    if engine is None:
        return {"running": 0, "waiting": 0, "limit": limit, "circuit_breaker": {"state": "closed", "failures": 0}}
    stats, breaker = engine.batcher.stats, engine.batcher.breaker
    return {
        "running": stats.running,
        "waiting": stats.waiting,
        "unfinished": engine.batcher.num_unfinished,
        "limit": limit,
        "circuit_breaker": {
            "state": breaker.state,
            "failures": breaker.consecutive_failures,
            "last_error": breaker.last_error,
        },
    }


def batcher_stats(pipeline: InferencePipeline) -> dict[str, Any]:
    """Throughput, batch and KV numbers of the last step."""
    engine = pipeline.current_engine
    stats = engine.batcher.stats if engine is not None else BatcherStats()
    hits = stats.hit_tokens / stats.queried_tokens if stats.queried_tokens else 0.0
    return {
        "steps": stats.steps,
        "failed_steps": stats.failed_steps,
        "running": stats.running,
        "waiting": stats.waiting,
        "batch_size": stats.batch_size,
        "batch_tokens": stats.batch_tokens,
        "tokens_per_second": round(stats.tokens_per_s, 2),
        "generated_tokens": stats.total_tokens,
        "preemptions": stats.preemptions,
        "prefix_hit_rate": round(hits, 4),
        "kv_blocks": {"total": stats.blocks_total, "free": stats.blocks_free, "cached": stats.blocks_cached},
        "max_batch_size": pipeline.settings.engine.max_batch_size,
    }


def device_status(pipeline: InferencePipeline) -> list[dict[str, Any]]:
    """Per device: its limit, what VRAMancer holds on it, and what the hardware reports."""
    engine = pipeline.current_engine
    result: list[dict[str, Any]] = []
    for device in engine.plan.devices if engine is not None else ():
        budget = engine.budgets[device.name] if engine is not None else None
        used = budget.used_by_purpose() if budget is not None else {}
        result.append(
            {
                "name": device.name,
                "index": device.index,
                "backend": device.kind,
                "limit_bytes": device.memory_limit_bytes,
                "used_bytes": sum(used.values()),
                "used_by_purpose": used,
            }
        )
    return result


def metrics_snapshot(pipeline: InferencePipeline) -> MetricsSnapshot:
    """What Prometheus reads at a scrape."""
    engine = pipeline.current_engine
    if engine is None:
        return MetricsSnapshot()
    stats = engine.batcher.stats
    used, alive_s = stats.blocks_total - stats.blocks_free, max(engine.alive_s, 1e-9)
    stages = list(zip(engine.plan.placement.stages, engine.stages, strict=True))
    tiers, tier_moves, dropped = tier_states(engine)
    return MetricsSnapshot(
        tiers=tiers,
        tier_moves=tier_moves,
        tier_dropped_writes_total=dropped,
        lending=lending_state(engine),
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
