"""Placement where devices lend each other memory for KV: a stage need not hold all of it itself. Pure.

Without lending, the fastest cuts may leave a stage too little room for KV, and `profiled` gives speed away for it. With
lending, they are taken if all memory together holds as much KV, and they are faster although a part of it is borrowed:
a device may even serve as memory alone.

What borrowing costs is reckoned for the streams the plan is made for. A stage that lacks room for `a` of the bytes that
a step reads has the lender with most to spare attend to them, at the same time as it attends to its own::

    longer by   max(own / own bandwidth, rounds + a / lender bandwidth) - (own + a) / own bandwidth
    and, where the lender has a stage itself, by a / lender bandwidth of its time
"""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import InsufficientMemoryError
from core.placement.cost import best_cohorts, decode_tok_s
from core.placement.engine import PlacementDevice, PlacementRequest, place, place_profiled, stage_costs
from core.placement.plan import PlacementPlan, StagePlan
from core.placement.pooling import PooledKV, pool_kv

CLEARLY = 1.03
"""A plan that borrows has to be so much faster by prediction: what it spares is certain, what it costs is not."""
_ABOUT_ALL = 0.95
"""A plan may hold so much less KV: whole pages and the lend ratio leave a little unused."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    plan: PlacementPlan
    pooled: PooledKV
    tok_s: float


def place_pooled(request: PlacementRequest, strategy: str, lend_ratio: float, least_tokens: int = 0) -> PlacementPlan:
    """`place`, and for `profiled` a plan that borrows where that is faster. `lend_ratio` 0: nobody lends. A plan
    that borrows holds at least `least_tokens` of KV, if the other one does.

    Raises what `place` raises.
    """
    plan = place(request, strategy)
    if strategy != "profiled" or request.layers is not None or lend_ratio <= 0 or len(request.devices) == 1:
        return plan
    base = _weigh(request, plan, lend_ratio)
    wanted = min(base.pooled.tokens, request.wanted_kv_tokens)
    best = base
    for tokens in _levels(request, plan.kv_tokens):
        try:
            other = _weigh(request, place_profiled(request, least_kv_tokens=tokens), lend_ratio)
        except InsufficientMemoryError:
            continue
        if (
            other.pooled.tokens >= max(_ABOUT_ALL * wanted, min(least_tokens, base.pooled.tokens))
            and other.tok_s > CLEARLY * best.tok_s
        ):
            best = other
    return best.plan


def _levels(request: PlacementRequest, held: int) -> list[int]:
    """How much KV a stage may have to hold itself, instead of `held` tokens: what the streams need, and parts of it."""
    needed, least, block = request.needed_kv_tokens, request.least_kv_tokens, request.block_size
    parts = {max(least, needed // part // block * block) for part in (1, 2, 4, 8)} | {least}
    return sorted((tokens for tokens in parts if tokens < held), reverse=True)


def pool_of(request: PlacementRequest, plan: PlacementPlan, lend_ratio: float) -> PooledKV:
    """The KV that a plan's devices hold together."""
    return pool_kv(
        plan.stages,
        [device.limit_bytes for device in request.devices if device.name in plan.unused_devices],
        kv_tokens=plan.kv_tokens,
        max_tokens=request.wanted_kv_tokens if lend_ratio > 0 else plan.kv_tokens,
        block_size=request.block_size,
        lend_ratio=lend_ratio,
    )


def _weigh(request: PlacementRequest, plan: PlacementPlan, lend_ratio: float) -> _Candidate:
    pooled = pool_of(request, plan, lend_ratio)
    return _Candidate(plan, pooled, pooled_tok_s(request, plan, pooled))


def pooled_tok_s(request: PlacementRequest, plan: PlacementPlan, pooled: PooledKV) -> float:
    """Tokens per second of the request's streams, with what they lack at home borrowed."""
    costs, links, streams, context = request.costs, request.links, request.streams, request.context
    stages = stage_costs(plan, request)
    latency = request.objective == "latency"
    cohorts = 1 if latency else best_cohorts(costs, stages, links, streams, context)
    round_s = streams / decode_tok_s(costs, stages, links, streams, context, cohorts)
    return streams / (round_s + borrowing_s(request, plan, pooled, streams, context, cohorts))


def borrowing_s(
    request: PlacementRequest, plan: PlacementPlan, pooled: PooledKV, streams: int, context: int, cohorts: int
) -> float:
    """How much longer a round of `streams` sequences of `context` tokens takes because some of the KV is lent."""
    read, total_s = min(streams * context, pooled.tokens), 0.0
    for stage, local in zip(plan.stages, pooled.local_tokens, strict=True):
        if local < read:
            total_s += _stage_borrowing_s(request, plan, stage, (local, read), -(-streams // cohorts), cohorts)
    return total_s


def _stage_borrowing_s(
    request: PlacementRequest, plan: PlacementPlan, stage: StagePlan, kv: tuple[int, int], rows: int, cohorts: int
) -> float:
    """`kv`: tokens of KV at home, and read in all; partial results are fp32, about twice as long as queries."""
    lender, idle = _lender(request, plan, stage)
    own, (local, read) = request.devices[stage.device_index], kv
    out, home = request.links.link(own.name, lender.name), request.links.link(lender.name, own.name)
    query_bytes = rows * request.costs.hidden_bytes
    rounds_s = cohorts * stage.num_layers * (out.transfer_s(query_bytes) + home.transfer_s(2 * query_bytes))
    own_rate, lender_rate = own.profile.kv_bytes_s, lender.profile.kv_bytes_s
    away = (read - local) * stage.kv_bytes_per_token
    own_s, away_s = local * stage.kv_bytes_per_token / own_rate, away / lender_rate
    longer_s = max(own_s, rounds_s + away_s) - own_s - away / own_rate
    return longer_s if idle else max(0.0, longer_s) + away_s


def _lender(request: PlacementRequest, plan: PlacementPlan, stage: StagePlan) -> tuple[PlacementDevice, bool]:
    """The device with most to spare beside the stage's own, and whether it has no stage itself."""
    spare = {device.name: device.limit_bytes for device in request.devices}
    for other in plan.stages:
        spare[other.device_name] -= other.weight_bytes + other.workspace_bytes + other.kv_bytes
    del spare[stage.device_name]
    name = max(spare, key=lambda key: spare[key])
    return next(device for device in request.devices if device.name == name), name in plan.unused_devices
