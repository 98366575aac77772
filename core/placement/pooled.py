"""Placement where devices lend each other memory for KV: a stage need not hold all of it itself. Pure.

Without lending, the fastest cuts may leave a stage too little room for KV, and `profiled` gives speed away for it. With
lending, they are taken if all memory together holds as much KV, and they are faster although a part of it is borrowed:
a device may even serve as memory alone.

What borrowing costs is reckoned for the streams the plan is made for. A stage that lacks room for `a` of the bytes that
a step reads has the lender with most to spare attend to them, at the same time as it attends to its own::

    a pass is longer by   max(own / own rate, rounds + a / lender rate) - (own + a) / own rate
    and one of the lender's stage, if it has one, by   a / lender rate

for a cohort's share of the KV; a round is then as long as the longest way or the busiest device, as without lending.

A device lends to one of another machine only where the network is quick enough: where attending to an extent there
takes less of a step than fetching it each step would, and less than computing it again. What its own machine lends
comes first.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from core.costs import PlacementDevice, PlacementProblem
from core.costs.cost import Batch, at_once, best_cohorts, decode_tok_s, pipeline_s
from core.costs.plan import PlacementPlan, StagePlan
from core.devices.device import machine_of
from core.errors import InsufficientMemoryError
from core.placement.engine import place, place_profiled, stage_costs
from core.placement.search import largest

CLEARLY = 1.03
"""A plan that borrows has to be so much faster by prediction: what it spares is certain, what it costs is not."""
_ABOUT_ALL = 0.95
"""A plan may hold so much less KV: whole pages and the lend ratio leave a little unused."""


@dataclass(frozen=True, slots=True)
class PooledKV:
    """`tokens` in all; `local_tokens[i]` of them have room on the device of stage `i` itself, the others are lent.
    `far` are borrowers and lenders of different machines that this takes."""

    tokens: int
    local_tokens: tuple[int, ...]
    far: tuple[tuple[str, str], ...] = ()


def pooled_bound(stages: Sequence[StagePlan], idle_limits: Sequence[int] = ()) -> int:
    """Tokens that all memory together would hold if every byte could be used for any stage."""
    free = sum(stage.limit_bytes - stage.weight_bytes - stage.workspace_bytes for stage in stages) + sum(idle_limits)
    return free // max(1, sum(stage.kv_bytes_per_token for stage in stages))


def place_pooled(request: PlacementProblem, strategy: str, lend_ratio: float, least_tokens: int = 0) -> PlacementPlan:
    """`place`, and for `profiled` a plan that borrows where that is faster. `lend_ratio` 0: nobody lends. A plan
    that borrows holds at least `least_tokens` of KV, if the other one does.

    Raises what `place` raises.
    """
    plan = place(request, strategy)
    if strategy != "profiled" or request.layers is not None or lend_ratio <= 0 or len(request.devices) == 1:
        return plan
    pooled = pool_of(request, plan, lend_ratio)
    best, best_tok_s = plan, pooled_tok_s(request, plan, pooled)
    enough = max(_ABOUT_ALL * min(pooled.tokens, request.wanted_kv_tokens), min(least_tokens, pooled.tokens))
    for tokens in _levels(request, plan.kv_tokens):
        try:
            other = place_profiled(request, least_kv_tokens=tokens)
        except InsufficientMemoryError:
            continue
        held = pool_of(request, other, lend_ratio)
        tok_s = pooled_tok_s(request, other, held)
        if held.tokens >= enough and tok_s > CLEARLY * best_tok_s:
            best, best_tok_s = other, tok_s
    return best


def _levels(request: PlacementProblem, held: int) -> list[int]:
    """How much KV a stage may have to hold itself, instead of `held` tokens: what the streams need, and parts of it."""
    needed, least, block = request.needed_kv_tokens, request.least_kv_tokens, request.block_size
    parts = {max(least, needed // part // block * block) for part in (1, 2, 4, 8)} | {least}
    return sorted((tokens for tokens in parts if tokens < held), reverse=True)


def pool_of(request: PlacementProblem, plan: PlacementPlan, lend_ratio: float) -> PooledKV:
    """How many tokens of KV a plan's devices hold together, in whole blocks: at least the `kv_tokens` that every stage
    has room for itself, at most what is wanted. Each device lends `lend_ratio` of its limit at most.

    A stage needs `T k_i` bytes for `T` tokens and has `F_i` left beside its weights. Alone, the scarcest stage sets
    `T = min(F_i / k_i)`. With lending, deficits are met by what others have left over, each lender giving at most its
    share::

        sum over i of max(0, T k_i - F_i)  <=  sum over j of min(share_j, F_j - T k_j)   over j without a deficit

    Devices that hold no layers take part with all their memory. The sums are those of each machine, since devices lend
    to those beside them first; what a machine lacks then comes from devices of others that `_far_lenders` allows.
    """
    stages, block = plan.stages, request.block_size
    idle = [device for device in request.devices if device.name in plan.unused_devices]
    free = [stage.limit_bytes - stage.weight_bytes - stage.workspace_bytes for stage in stages]
    page_bytes = [stage.kv_bytes_per_token * block for stage in stages]
    allowed = _far_lenders(request, plan)

    def far_loans(blocks: int) -> list[tuple[str, str]] | None:
        """Who borrows from whom on another machine; None if somebody lacks more than there is."""
        spare = Counter({device.name: int(lend_ratio * device.limit_bytes) for device in idle})
        lacking = list[tuple[StagePlan, int]]()
        for stage, room, page in zip(stages, free, page_bytes, strict=True):
            left = room - blocks * page
            if left < 0:  # whole pages; one of a stage that borrows stays empty, for blocks to change places through
                lacking.append((stage, (blocks + 1 - room // page) * page))
            else:
                spare[stage.device_name] += min(int(lend_ratio * stage.limit_bytes), left)
        lacking.sort(key=lambda each: len(allowed.get(each[0].device_name, ())))
        still = [(stage, _take(spare, _beside(stage, spare), nbytes)[1]) for stage, nbytes in lacking]
        loans = list[tuple[str, str]]()
        for stage, nbytes in still:
            taken, lacks = _take(spare, allowed.get(stage.device_name, ()), nbytes)
            if lacks:
                return None
            loans += [(stage.device_name, lender) for lender in taken]
        return loans

    def fits(blocks: int) -> bool:
        return far_loans(blocks) is not None

    wanted = request.wanted_kv_tokens if lend_ratio > 0 else plan.kv_tokens
    most = largest(fits, plan.kv_tokens // block, max(plan.kv_tokens, wanted) // block)
    local = [most if page == 0 else min(most, room // page) for room, page in zip(free, page_bytes, strict=True)]
    return PooledKV(most * block, tuple(blocks * block for blocks in local), tuple(far_loans(most) or ()))


def _beside(stage: StagePlan, names: Iterable[str]) -> list[str]:
    """Those of the stage's own machine."""
    return [name for name in names if machine_of(name) == machine_of(stage.device_name)]


def _take(spare: Counter[str], lenders: Iterable[str], nbytes: int) -> tuple[list[str], int]:
    """Take so many bytes off what lenders have to spare, most from those that have most: who gives, and what lacks."""
    taken = []
    for name in sorted(lenders, key=lambda name: -spare[name]):
        part = min(nbytes, spare[name])
        if part > 0:
            spare[name] -= part
            nbytes -= part
            taken.append(name)
    return taken, nbytes


def _far_lenders(request: PlacementProblem, plan: PlacementPlan) -> dict[str, tuple[str, ...]]:
    """Devices of other machines that may lend to each stage, by the stage's device."""
    tokens = request.far_extent_blocks * request.block_size
    if not tokens:
        return {}
    computing, hops = pipeline_s(request.costs, stage_costs(plan, request), request.links, Batch(tokens, tokens, 0))
    again_s = sum(computing) + sum(hops)
    return {
        stage.device_name: tuple(
            device.name for device in request.devices
            if machine_of(device.name) != machine_of(stage.device_name) and _lends_far(request, stage, device, again_s)
        )
        for stage in plan.stages
    }  # fmt: skip


def _lends_far(request: PlacementProblem, stage: StagePlan, lender: PlacementDevice, again_s: float) -> bool:
    """Whether a stage may borrow from a device of another machine: whether attending to an extent there takes less of a
    step than fetching it would, and less than computing its tokens again, which takes `again_s`. Not where the way has
    not been measured."""
    own = stage.device_name
    if not {(own, lender.name), (lender.name, own)} <= request.links.links.keys():
        return False
    nbytes = request.far_extent_blocks * request.block_size * stage.kv_bytes_per_token
    there_s = _rounds_s(request, stage, lender, request.streams) + nbytes / lender.profile.kv_bytes_s
    fetching_s = request.links.copying(lender.name, own).transfer_s(nbytes)
    return there_s < min(fetching_s, again_s)


def pooled_tok_s(request: PlacementProblem, plan: PlacementPlan, pooled: PooledKV) -> float:
    """Tokens per second of the request's streams, with what they lack at home borrowed."""
    stages, streams, context = stage_costs(plan, request), request.streams, request.context
    latency = request.objective == "latency"
    cohorts = 1 if latency else best_cohorts(request.costs, stages, request.links, streams, context)
    return borrowing_tok_s(request, plan, pooled, streams, context, cohorts)


def borrowing_tok_s(
    request: PlacementProblem, plan: PlacementPlan, pooled: PooledKV, streams: int, context: int, cohorts: int
) -> float:
    """Tokens per second of `streams` sequences of `context` tokens, of whose KV a part is lent."""
    stages = stage_costs(plan, request)
    late_s, idle_s = _late_s(request, plan, pooled, min(streams * context, pooled.tokens), (streams, cohorts))
    return decode_tok_s(request.costs, stages, request.links, streams, context, cohorts, late_s, idle_s)


def _late_s(
    request: PlacementProblem, plan: PlacementPlan, pooled: PooledKV, read: int, batches: tuple[int, int]
) -> tuple[list[float], float]:
    """By stage: how much longer a pass of a cohort takes because some of the `read` tokens of KV are lent, and because
    it attends for others; and what devices without a stage do for others in a round. `batches`: streams, cohorts."""
    streams, cohorts = batches
    stages = at_once(stage_costs(plan, request)) if cohorts > 1 else stage_costs(plan, request)
    index = {stage.device_name: number for number, stage in enumerate(plan.stages)}
    late_s, idle_s = [0.0] * len(stages), defaultdict[str, float](float)
    for number, (stage, local) in enumerate(zip(plan.stages, pooled.local_tokens, strict=True)):
        if local >= read:
            continue
        lender = _lender(request, plan, stage, pooled.far)
        at = index.get(lender.name)
        lender_rate = (lender.profile if at is None else stages[at].device).kv_bytes_s
        own_rate, per_cohort = stages[number].device.kv_bytes_s, stage.kv_bytes_per_token / cohorts
        own_s, away_s = local * per_cohort / own_rate, (read - local) * per_cohort / lender_rate
        rounds_s = _rounds_s(request, stage, lender, -(-streams // cohorts))
        longer_s = max(own_s, rounds_s + away_s) - own_s - (read - local) * per_cohort / own_rate
        late_s[number] += longer_s
        if at is None:
            idle_s[lender.name] += cohorts * away_s
        else:
            late_s[at] += away_s
    return late_s, max(idle_s.values(), default=0.0)


def _rounds_s(request: PlacementProblem, stage: StagePlan, lender: PlacementDevice, rows: int) -> float:
    """All layers' exchanges of a pass; partial results are fp32, about twice as long as queries."""
    own, query_bytes = request.devices[stage.device_index].name, rows * request.costs.hidden_bytes
    out, home = request.links.copying(own, lender.name), request.links.copying(lender.name, own)
    return stage.num_layers * (out.transfer_s(query_bytes) + home.transfer_s(2 * query_bytes))


def _lender(
    request: PlacementProblem, plan: PlacementPlan, stage: StagePlan, far: Collection[tuple[str, str]]
) -> PlacementDevice:
    """The device with most to spare beside the stage's own: of those of other machines that lend to it, if there are
    some, for they are slowest; else of the same machine."""
    spare = {device.name: device.limit_bytes for device in request.devices}
    for other in plan.stages:
        spare[other.device_name] -= other.weight_bytes + other.workspace_bytes + other.kv_bytes
    others = [device for device in request.devices if (stage.device_name, device.name) in far] or [
        device for device in request.devices
        if device.name != stage.device_name and machine_of(device.name) == machine_of(stage.device_name)
    ]  # fmt: skip
    return max(others, key=lambda device: spare[device.name])
