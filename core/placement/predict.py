"""How fast a plan will be, what holds it back, and what other devices would bring."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from core.costs import PlacementDevice, PlacementProblem
from core.costs.cost import Batch, StageCost, at_once, best_cohorts, decode_tok_s, load_s, pipeline_s
from core.costs.plan import LayerCosts, PlacementPlan
from core.costs.profile import LinkTopology
from core.devices.device import host_of
from core.errors import InsufficientMemoryError
from core.placement.engine import predicted_tok_s, stage_costs
from core.placement.pooled import PooledKV, borrowing_tok_s
from core.placement.streaming import place_fastest

Limit = Literal["bandwidth", "compute", "overhead", "link"]


@dataclass(frozen=True, slots=True)
class PartPrediction:
    """A stage, a link between two, or the link over which a stage's layers stream in, for the batch of one cohort.

    Attributes:
        name: of the device, or of two: "cuda:0 -> cuda:1", "host -> cuda:0".
        layers: `(first, last)` of a stage: layers `first .. last - 1`; None for a link.
        seconds: for one batch.
        share: of the batch's way through all stages and links between them.
        busy: share of the time in which it works when all cohorts are in flight.
        limited_by: what most of its time goes to: memory bandwidth, compute, overhead (launches), or the link.
    """

    name: str
    layers: tuple[int, int] | None
    seconds: float
    share: float
    busy: float
    limited_by: Limit


@dataclass(frozen=True, slots=True)
class RatePrediction:
    """A number of streams that decode at the same time.

    Attributes:
        cohorts: batches in flight.
        tok_s: tokens per second of all streams.
        token_s: seconds between two tokens of a stream.
        parts: stages, then links, in the order of the way, for the largest cohort.
        bottleneck: the part that takes longest.
        roofline_tok_s: what no number of cohorts can exceed: stages take no longer than their bytes and operations do,
            each weight is read once for all streams, links are free but for layers that stream in, and borrowed KV is
            read by others meanwhile.
        spent_s: of a batch's way through all stages, by what the seconds go to.
        borrowing_s: seconds of a round, in which each stream gains a token, because some of the KV is lent; below 0
            where the lender and the stage's own device read it sooner together.
    """

    streams: int
    cohorts: int
    tok_s: float
    token_s: float
    parts: tuple[PartPrediction, ...]
    bottleneck: PartPrediction
    roofline_tok_s: float
    spent_s: Mapping[Limit, float]
    borrowing_s: float = 0.0

    @property
    def roofline_share(self) -> float:
        """What is reached of `roofline_tok_s`."""
        return self.tok_s / self.roofline_tok_s


@dataclass(frozen=True, slots=True)
class DeviceEffect:
    """What a device would change beside those of a plan, for the request's objective, streams and context.

    Attributes:
        tok_s: of the best plan that uses it and the plan's devices, and holds as much KV; None if there is none.
        tok_s_without: of the best plan for the plan's devices alone, with as much KV.
        kv_tokens: that the plan with it holds; 0 where there is none.
    """

    name: str
    tok_s: float | None
    tok_s_without: float
    kv_tokens: int

    @property
    def gain(self) -> float | None:
        """0.2: a fifth more tokens per second; negative: a loss."""
        return None if self.tok_s is None else self.tok_s / self.tok_s_without - 1


@dataclass(frozen=True, slots=True)
class Prediction:
    """What to expect of a plan.

    Attributes:
        rates: by number of streams.
        context: tokens of each stream.
        floor_s: for one token of one stream: the sum over the stages of bytes / bandwidth (or operations / compute
            rate where that is more). No step is faster.
        unused: what each device that was left out would change if it had to hold at least one layer.
    """

    rates: tuple[RatePrediction, ...]
    context: int
    floor_s: float
    unused: tuple[DeviceEffect, ...]


def predict(
    plan: PlacementPlan,
    request: PlacementProblem,
    streams: Sequence[int] = (1, 8, 32),
    context: int | None = None,
    pooled: PooledKV | None = None,
) -> Prediction:
    """What to expect of `plan`, a plan for `request`, with these numbers of streams of `context` tokens each.

    `context` is the request's where it is not given. With `pooled`, what streams lack at home is borrowed. `unused` is
    about the request's objective, streams and context.
    """
    context = request.context if context is None else context
    stages = stage_costs(plan, request)
    rates = tuple(predict_rate(plan, request, count, context, pooled) for count in streams)
    floor_s = 1 / _roofline_tok_s(request.costs, stages, request.links, 1, context)
    without = _best_tok_s(plan, request) if plan.unused_devices else 0.0
    left_out = [device for device in request.devices if device.name in plan.unused_devices]
    unused = tuple(_forced(plan, request, device, without) for device in left_out)
    return Prediction(rates, context, floor_s, unused)


def one_more(plan: PlacementPlan, request: PlacementProblem, device: PlacementDevice) -> DeviceEffect:
    """What another device beside those of the plan would bring. It may be left out, so the gain is never negative.

    Its links are taken for as fast as the slowest one that is known. Its name is made unique.
    """
    name = device.name
    while name in {known.name for known in request.devices}:
        name += "+"
    links = request.links
    if links.links:
        slowest = min((*links.links.values(), links.default), key=lambda link: link.bandwidth_bytes_s)
        others = [host_of(name), *(known.name for known in request.devices)]
        added = {pair: slowest for other in others for pair in ((name, other), (other, name))}
        links = replace(links, links={**links.links, **added})
    used = _used(plan, request)
    more = replace(request, devices=(*used, replace(device, name=name)), links=links, layers=None)
    with_it, without = place_fastest(more, least_kv_tokens=plan.kv_tokens), _best_tok_s(plan, request)
    return DeviceEffect(device.name, max(without, predicted_tok_s(with_it, more)), without, with_it.kv_tokens)


def _used(plan: PlacementPlan, request: PlacementProblem) -> tuple[PlacementDevice, ...]:
    """The plan's devices, in the order of the request."""
    return tuple(device for device in request.devices if device.name not in plan.unused_devices)


def _best_tok_s(plan: PlacementPlan, request: PlacementProblem) -> float:
    """Of the best plan for the devices of this one with as much KV."""
    same = replace(request, devices=_used(plan, request), layers=None)
    return predicted_tok_s(place_fastest(same, least_kv_tokens=plan.kv_tokens), same)


def _forced(plan: PlacementPlan, request: PlacementProblem, device: PlacementDevice, without: float) -> DeviceEffect:
    more = replace(request, devices=(device, *_used(plan, request)), layers=None)
    try:
        forced = place_fastest(more, required=frozenset({0}), least_kv_tokens=plan.kv_tokens)
    except InsufficientMemoryError:
        return DeviceEffect(device.name, None, without, 0)
    return DeviceEffect(device.name, predicted_tok_s(forced, more), without, forced.kv_tokens)


def predict_rate(
    plan: PlacementPlan, request: PlacementProblem, streams: int, context: int, pooled: PooledKV | None = None
) -> RatePrediction:
    """One number of streams; see `predict`."""
    costs, links, stages = request.costs, request.links, stage_costs(plan, request)
    cohorts = best_cohorts(costs, stages, links, streams, context)
    alone = tok_s = decode_tok_s(costs, stages, links, streams, context, cohorts)
    if pooled is not None:
        tok_s = borrowing_tok_s(request, plan, pooled, streams, context, cohorts)
    sizes = [streams // cohorts + (index < streams % cohorts) for index in range(cohorts)]
    batches = [Batch.decode(size, context) for size in sizes]
    local = None if pooled is None else pooled.local_tokens
    roofline = _roofline_tok_s(costs, stages, links, streams, context, local)
    stages = at_once(stages) if cohorts > 1 else stages
    streaming = [stage for stage in stages if stage.streamed]
    loads = tuple(load_s(costs, stage, links) for stage in streaming)
    timed = [pipeline_s(costs, stages, links, batch) for batch in batches]
    ways, way_s = [compute + hops + loads for compute, hops in timed], sum(map(sum, timed[0]))
    named: list[tuple[str, tuple[int, int] | None, Limit]] = [
        (stage.device.name, (stage.first, stage.last), stage_limit(costs, stage, batches[0])) for stage in stages
    ]
    named += [(f"{src.device.name} -> {dst.device.name}", None, "link") for src, dst in pairwise(stages)]
    named += [(f"{host_of(stage.device.name)} -> {stage.device.name}", None, "link") for stage in streaming]
    parts = tuple(
        PartPrediction(name, layers, all_s[0], all_s[0] / way_s, sum(all_s) * tok_s / streams, limit)
        for (name, layers, limit), all_s in zip(named, zip(*ways, strict=True), strict=True)
    )
    slowest = max(parts, key=lambda part: part.seconds)
    spent = _way_spent_s(costs, stages, batches[0], timed[0][1], way_s)
    return RatePrediction(
        streams, cohorts, tok_s, streams / tok_s, parts, slowest, roofline, spent, streams / tok_s - streams / alone
    )


def stage_limit(costs: LayerCosts, stage: StageCost, batch: Batch) -> Limit:
    """What most of a stage's time goes to."""
    spent = spent_s(costs, stage, batch)
    return max(spent, key=lambda limit: spent[limit])


def spent_s(costs: LayerCosts, stage: StageCost, batch: Batch) -> dict[Limit, float]:
    """Seconds of a stage's pass by what they go to."""
    device, rows = stage.device, batch.tokens
    spent: dict[Limit, float] = {"bandwidth": 0.0, "compute": 0.0}
    per_layer_s = device.layer_overhead_s + rows * device.row_overhead_s
    spent["overhead"] = device.step_overhead_s + (stage.last - stage.first) * per_layer_s
    layers = range(stage.first, stage.last)
    work: list[tuple[float, int, int]] = [
        (costs.read_bytes(layer, rows), costs.layer_flops[layer], rows) for layer in layers
    ]
    if stage.last == costs.num_layers:
        work.append((costs.after_bytes + costs.head_bytes, costs.head_flops, batch.logit_rows))
    for nbytes, flops, number in work:
        read_s, compute_s = nbytes / device.bandwidth_bytes_s, number * flops / device.flops_at(number)
        spent["bandwidth" if read_s >= compute_s else "compute"] += max(read_s, compute_s)
    per_token = costs.stage_kv_bytes_per_token(stage.first, stage.last)
    spent["bandwidth"] += batch.kv_tokens * per_token / device.kv_bytes_s
    return spent


def _way_spent_s(
    costs: LayerCosts, stages: Sequence[StageCost], batch: Batch, hops: Sequence[float], way_s: float
) -> dict[Limit, float]:
    """Of a batch's way through all stages. What stages wait for layers that stream in counts as link."""
    total: Counter[Limit] = Counter()
    for stage in stages:
        total.update(spent_s(costs, stage, batch))
    waiting_s = max(0.0, way_s - sum(hops) - sum(total.values()))
    return {**total, "link": sum(hops) + waiting_s}


def _roofline_tok_s(
    costs: LayerCosts, stages: Sequence[StageCost], links: LinkTopology, streams: int, context: int,
    local: Sequence[int] | None = None,
) -> float:  # fmt: skip
    """Every stream's token has to pass all stages, the busiest stage has to serve all streams, and what streams in has
    to come in once. `local` is how many tokens of KV each stage reads itself; others are read meanwhile."""
    held = local or (streams * context,) * len(stages)
    way_s = sum(_roofline_s(costs, stage, 1, min(context, own)) for stage, own in zip(stages, held, strict=True))
    busiest_s = max(
        _roofline_s(costs, stage, streams, min(streams * context, own)) for stage, own in zip(stages, held, strict=True)
    )
    return streams / max(way_s, busiest_s, *(load_s(costs, stage, links) for stage in stages))


def _roofline_s(costs: LayerCosts, stage: StageCost, streams: int, kv_tokens: int) -> float:
    weights = sum(costs.read_bytes(layer, streams) for layer in range(stage.first, stage.last))
    flops = sum(costs.layer_flops[stage.first : stage.last])
    if stage.last == costs.num_layers:
        weights, flops = weights + costs.after_bytes + costs.head_bytes, flops + costs.head_flops
    kv = kv_tokens * costs.stage_kv_bytes_per_token(stage.first, stage.last)
    compute_s = streams * flops / max(rate for _, rate in stage.device.flops)
    return max((weights + kv) / stage.device.bandwidth_bytes_s, compute_s)
