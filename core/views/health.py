"""Whether the service is well: one check per part."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import psutil

from core.defaults import NO_MODEL
from core.devices import format_bytes
from core.embedding.engine import EncoderEngine
from core.engine.model_engine import ModelEngine
from core.upstreams.group import GroupView
from core.views.memory import tier_troubles
from core.views.state import ServiceState

LOW_DISK_BYTES = 256 * 1024 * 1024
LOW_MEMORY_BYTES = 128 * 1024 * 1024

Status = Literal["ok", "degraded", "error"]
_ORDER: tuple[Status, ...] = ("ok", "degraded", "error")


@dataclass(frozen=True, slots=True)
class Check:
    """How one part is."""

    status: Status
    detail: str


@dataclass(frozen=True, slots=True)
class Health:
    """All checks by the name of the part; the worst one's status is the whole's."""

    status: Status
    checks: Mapping[str, Check]

    @property
    def failed(self) -> list[str]:
        """Parts with an error."""
        return [name for name, check in self.checks.items() if check.status == "error"]


def health(engine: ModelEngine | None, service: ServiceState) -> Health:
    """`/health`."""
    checks = {"engine": _engine_check(engine, service), "model": _model_check(engine, service)}
    checks["devices"] = _devices_check(engine)
    available = psutil.virtual_memory().available
    checks["memory"] = _check(
        True, f"{format_bytes(available)} of main memory available", warn=available < LOW_MEMORY_BYTES
    )
    if engine is not None:
        stats = engine.batcher.stats
        used = stats.blocks_total - stats.blocks_free
        checks["kv_cache"] = _check(True, f"{used} of {stats.blocks_total} blocks in use")
        if engine.memory.tiers is not None or tier_troubles(engine):
            checks["tiers"] = _tiers_check(engine)
    for encoder in service.encoders:
        checks[encoder.info.kind] = _encoder_check(encoder)
    if service.upstreams:
        checks["upstreams"] = _upstreams_check(service.upstreams)
    free = shutil.disk_usage(service.settings.runtime.cache_dir.anchor or ".").free
    checks["disk"] = _check(True, f"{format_bytes(free)} free", warn=free < LOW_DISK_BYTES)
    return Health(max((check.status for check in checks.values()), key=_ORDER.index), checks)


def _check(ok: bool, detail: str, *, warn: bool = False) -> Check:
    return Check(("degraded" if warn else "ok") if ok else "error", detail)


def _engine_check(engine: ModelEngine | None, service: ServiceState) -> Check:
    if service.closing:
        return _check(False, "the server is shutting down")
    if engine is None and not service.loading and service.settings.model.name == NO_MODEL:
        return _check(True, "no model is to be served by this machine")
    if engine is None:
        return _check(False, "a model is being loaded" if service.loading else f"no engine: {service.reason}")
    batcher = engine.batcher
    if not batcher.alive:
        return _check(False, f"the engine thread has ended: {batcher.error!r}")
    state = batcher.breaker.state
    if state != "closed":
        return _check(state != "open", f"circuit breaker is {state}: {batcher.breaker.last_error}", warn=True)
    return _check(True, f"{batcher.stats.steps} steps, {batcher.stats.failed_steps} failed")


def _model_check(engine: ModelEngine | None, service: ServiceState) -> Check:
    if not service.ready:
        return _check(False, service.reason)
    return _check(True, f"{engine.model.name} has produced tokens" if engine is not None else "others answer")


def _devices_check(engine: ModelEngine | None) -> Check:
    if engine is None:
        return _check(True, "no device in use")
    try:
        for budget in engine.budgets.values():
            budget.check_invariants()
    except AssertionError as error:
        return _check(False, str(error))
    names = ", ".join(engine.budgets)
    return _check(True, f"within budget: {names}")


def _encoder_check(encoder: EncoderEngine) -> Check:
    name, stats = encoder.info.name, encoder.stats
    if not encoder.alive:
        return _check(False, f"the thread of {name} has ended: {encoder.error!r}")
    return _check(
        True, f"{name}: {stats.batches} batches, {stats.failed_batches} failed, {stats.waiting_inputs} inputs wait"
    )


def _upstreams_check(groups: Sequence[GroupView]) -> Check:
    """Models of other servers: the service is degraded without one of them, and other models are as they were."""
    parts = []
    for group in groups:
        for replica in group.replicas:
            state = "reachable" if replica.reachable is not False else "not reachable"
            if replica.url is None:
                state = "loaded here"
            if replica.breaker != "closed":
                state += f", breaker {replica.breaker}"
            reason = f" ({replica.last_error})" if replica.last_error else ""
            parts.append(f"{group.name} at {replica.url or 'self'}: {state}{reason}")
    well = all(
        replica.reachable is not False and replica.breaker == "closed" for group in groups for replica in group.replicas
    )
    return _check(True, "; ".join(parts), warn=not well)


def _tiers_check(engine: ModelEngine) -> Check:
    troubles = tier_troubles(engine)
    detail = "; ".join(f"{name} is not used: {reason}" for name, reason in troubles.items())
    return _check(True, detail or "all tiers take blocks", warn=bool(troubles))
