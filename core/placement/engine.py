"""Placement by named strategies: what to place goes in, a plan comes out.

Built in are

- `profiled`: the fastest plan that the cost model knows, by `core.placement.search`;
- `vram`: layers by free memory, in the order of the devices, by `core.placement.splitter`;
- `balanced`: as many layers on each device as on any other, give or take one;
- layers by hand: `PlacementProblem.layers` has a count per device.

Others are registered with `register_strategy`.

How many tokens of KV `profiled` makes sure of: all that are wanted (`max_kv_tokens`) if any plan holds them. Otherwise
memory is short, and what counts is what the streams need (`streams * context`, but no fewer than `min_kv_tokens`): KV
that nobody is waiting for is no reason to take a slow device. If even these do not fit, as many as any plan holds. Of
the plans that hold that many it takes the fastest, and then fills their devices with KV, up to what is wanted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, product

from core.costs.cost import Batch, StageCost, best_cohorts, decode_tok_s
from core.costs.plan import SLOTS, PlacementPlan, PlacementProblem, StagePlan
from core.errors import InsufficientMemoryError, InvalidRequestError
from core.placement.programme import Cut
from core.placement.search import PlacementSearch, lacking_memory
from core.placement.splitter import cuts_by_memory

BY_HAND = "by hand"
_NAME = re.compile(r"[a-z][a-z0-9_-]*")
_ALL_COHORTS_UP_TO = 5
_CLEARLY = 1 + 1e-9


Strategy = Callable[[PlacementProblem], PlacementPlan]


def register_strategy(name: str, function: Strategy) -> None:
    """Make a strategy of one's own known to `place`, and so to `--placement`.

    `function` gets the request and returns a plan; `build_plan` makes one from cuts, and raises
    `InsufficientMemoryError` if they do not fit. What it returns is checked before it is used::

        def first_only(request):
            return build_plan(request, "first-only", [Cut(0, 0, request.costs.num_layers)])

        register_strategy("first-only", first_only)

    Raises:
        ValueError: the name is taken, or is not made of lower-case letters, digits, "-" and "_".
    """
    if name in _STRATEGIES or not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is taken or no name for a strategy; there are {', '.join(strategies())}")
    _STRATEGIES[name] = function


def strategies() -> tuple[str, ...]:
    """The names that `place` knows."""
    return tuple(sorted(_STRATEGIES))


def place(request: PlacementProblem, strategy: str = "profiled") -> PlacementPlan:
    """The plan of a strategy. Where `request.layers` are given, they are the plan, and its strategy is "by hand".

    Raises:
        InvalidRequestError: no such strategy, or layers by hand that are not the model's.
        InsufficientMemoryError: the model does not fit with `min_kv_tokens`; says what each device lacks.
        ValueError: a registered strategy returned what is no plan.
    """
    if strategy not in _STRATEGIES:
        raise InvalidRequestError(
            f"There is no placement strategy {strategy!r}; there are {', '.join(strategies())}.", param="placement"
        )
    if request.layers is not None:
        return build_plan(request, BY_HAND, cuts_by_hand(request, request.layers))
    plan = _STRATEGIES[strategy](request)
    _check(request, plan, strategy)
    return plan


def parse_layers(text: str) -> tuple[int, ...]:
    """The numbers of layers in "20,12", one for each device.

    Raises:
        InvalidRequestError: it is not a list of whole numbers.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise InvalidRequestError(
            f'layers {text!r}: write a number of layers for each device, such as "20,12".', param="layers"
        )
    return tuple(map(int, parts))


def build_plan(request: PlacementProblem, strategy: str, cuts: Sequence[Cut]) -> PlacementPlan:
    """The plan with these stages, in the order of execution, and as much KV as is wanted and fits.

    Raises:
        InsufficientMemoryError: `min_kv_tokens` do not fit; says how many bytes each device lacks.
    """
    stages = [plan_stage(request, cut) for cut in cuts]
    kv_tokens = min([request.wanted_kv_tokens, *(kv_room(request, stage) for stage in stages)])
    if kv_tokens < request.least_kv_tokens:
        raise _insufficient(request, cuts)
    return assemble(request, strategy, stages, kv_tokens)


def plan_stage(request: PlacementProblem, cut: Cut, streamed: tuple[int, ...] = ()) -> StagePlan:
    """A stage without KV, of whose layers those that are `streamed` stay in main memory."""
    costs, (index, first, last) = request.costs, cut
    sizes = [costs.layer_bytes[layer] for layer in streamed]
    slot_bytes = max(sizes, default=0)
    return StagePlan(
        device_name=request.devices[index].name,
        device_index=index,
        first_layer=first,
        last_layer=last,
        weight_bytes=costs.weight_bytes(first, last) - sum(sizes) + SLOTS * slot_bytes,
        kv_bytes_per_token=costs.stage_kv_bytes_per_token(first, last),
        kv_bytes=0,
        workspace_bytes=costs.stage_workspace_bytes(last),
        limit_bytes=request.devices[index].limit_bytes,
        streamed_layers=streamed,
        streamed_bytes=sum(sizes),
        slot_bytes=slot_bytes,
    )


def kv_room(request: PlacementProblem, stage: StagePlan) -> int:
    """KV tokens that fit on a stage that has none yet, in whole blocks; negative if not even the weights fit."""
    if stage.free_bytes < 0 or stage.kv_bytes_per_token == 0:
        return request.wanted_kv_tokens if stage.free_bytes >= 0 else -1
    return stage.free_bytes // stage.kv_bytes_per_token // request.block_size * request.block_size


def assemble(request: PlacementProblem, strategy: str, stages: Sequence[StagePlan], kv_tokens: int) -> PlacementPlan:
    """The plan with these stages, each with `kv_tokens` tokens of KV."""
    whole = tuple(replace(stage, kv_bytes=stage.kv_bytes_per_token * kv_tokens) for stage in stages)
    used = {stage.device_index for stage in stages}
    unused = tuple(device.name for index, device in enumerate(request.devices) if index not in used)
    return PlacementPlan(request.model_name, strategy, whole, kv_tokens, unused)


def stage_costs(plan: PlacementPlan, request: PlacementProblem) -> tuple[StageCost, ...]:
    """A plan's stages as the cost model sees them."""
    return tuple(
        StageCost(
            request.devices[stage.device_index].profile, stage.first_layer, stage.last_layer, stage.streamed_layers
        )
        for stage in plan.stages
    )


def predicted_tok_s(plan: PlacementPlan, request: PlacementProblem) -> float:
    """Tokens per second of all streams of the request, by its objective: what `profiled` makes as large as it can."""
    return _tok_s(request, stage_costs(plan, request))


def _tok_s(request: PlacementProblem, stages: Sequence[StageCost]) -> float:
    costs, links, streams, context = request.costs, request.links, request.streams, request.context
    cohorts = 1 if request.objective == "latency" else best_cohorts(costs, stages, links, streams, context)
    return decode_tok_s(costs, stages, links, streams, context, cohorts)


def place_profiled(
    request: PlacementProblem, *, required: frozenset[int] = frozenset(), least_kv_tokens: int | None = None
) -> PlacementPlan:
    """The `profiled` strategy; with `required` devices, by index, that hold at least one layer.

    `least_kv_tokens` is how much KV to make sure of, instead of what this module's policy says. What the programme
    finds for several numbers of cohorts is compared under the full model, and with the plans of `vram` and `balanced`,
    so that it is slower than none of them that holds as much.

    Raises:
        InsufficientMemoryError: no plan holds as much.
    """
    search = PlacementSearch(request.costs, request.devices, request.links, required)
    least = _assured_tokens(request, search) if least_kv_tokens is None else least_kv_tokens
    assured = replace(request, min_kv_tokens=least, max_kv_tokens=max(least, request.max_kv_tokens))
    plans = [build_plan(assured, "profiled", cuts) for cuts in _searched(request, search, least)]
    refused = None
    for strategy in (_vram, _balanced):
        try:
            plan = strategy(assured)
        except InsufficientMemoryError as error:
            refused = refused or error
            continue
        if required <= {stage.device_index for stage in plan.stages}:
            plans.append(replace(plan, strategy="profiled"))
    if not plans:
        raise refused or _insufficient(assured, _even_cuts(assured, sorted(required)))
    rates = [predicted_tok_s(plan, request) for plan in plans]
    return next(plan for plan, rate in zip(plans, rates, strict=True) if rate * _CLEARLY >= max(rates))


def _assured_tokens(request: PlacementProblem, search: PlacementSearch) -> int:
    for tokens in (request.wanted_kv_tokens, request.needed_kv_tokens):
        if search.fits(tokens):
            return tokens
    most = search.most_kv_tokens(request.least_kv_tokens, request.needed_kv_tokens, request.block_size)
    return request.least_kv_tokens if most is None else most


def _searched(request: PlacementProblem, search: PlacementSearch, kv_tokens: int) -> list[tuple[Cut, ...]]:
    """What the programme finds best for all streams in one batch, or for each number of cohorts that may serve well."""
    number, streams, context = len(request.devices), request.streams, request.context
    if request.objective == "latency":
        cuts = search.best(Batch.decode(streams, context), kv_tokens, "latency")
        return [] if cuts is None else [cuts]
    counts = range(1, 2 * number + 1) if number <= _ALL_COHORTS_UP_TO else (1, 2, 3, 4, number, 2 * number)
    # Whether a part will have others beside it depends on the plan, so both are tried.
    sharing = (True, False) if any(device.profile.sharing for device in request.devices) else (True,)
    found, fastest = [], 0.0
    for count, crowded in product(sorted({min(count, streams) for count in counts}), sharing):
        size = -(-streams // count)
        under_s = size * count / fastest if fastest else math.inf
        cuts = search.best_round(Batch.decode(size, context), kv_tokens, count, under_s, crowded=crowded)
        if cuts is not None:
            found.append(cuts)
            stages = [StageCost(request.devices[device].profile, first, last) for device, first, last in cuts]
            fastest = max(fastest, _tok_s(request, stages))
    return found


def _vram(request: PlacementProblem) -> PlacementPlan:
    return build_plan(request, "vram", cuts_by_memory(request))


def _balanced(request: PlacementProblem) -> PlacementPlan:
    """As many devices as it fits on; with fewer than all, those with the most memory."""
    order = sorted(range(len(request.devices)), key=lambda index: -request.devices[index].limit_bytes)
    most = min(len(order), request.costs.num_layers)
    refused = None
    for number in range(most, 0, -1):
        try:
            return build_plan(request, "balanced", _even_cuts(request, sorted(order[:number])))
        except InsufficientMemoryError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _even_cuts(request: PlacementProblem, used: Sequence[int]) -> list[Cut]:
    """The same number of layers on each; what is left over goes to those with the most memory."""
    each, over = divmod(request.costs.num_layers, len(used))
    roomy = sorted(used, key=lambda index: -request.devices[index].limit_bytes)[:over]
    return _in_turn({index: each + (index in roomy) for index in used})


def _in_turn(counts: Mapping[int, int]) -> list[Cut]:
    """So many layers on each device, in this order."""
    ends = accumulate(counts.values())
    return [Cut(device, last - count, last) for (device, count), last in zip(counts.items(), ends, strict=True)]


def cuts_by_hand(request: PlacementProblem, layers: tuple[int, ...]) -> list[Cut]:
    """The stages that `layers` describe. Raises `InvalidRequestError` if they are not the model's."""
    num_layers, number = request.costs.num_layers, len(request.devices)
    if sum(layers) != num_layers or len(layers) > number or min(layers, default=0) < 0:
        names = ", ".join(device.name for device in request.devices)
        raise InvalidRequestError(
            f"layers {','.join(map(str, layers))}: {request.model_name} has {num_layers} layers for at most {number} "
            f"devices ({names}), and these are {sum(layers)} for {len(layers)}.",
            param="layers",
        )
    return _in_turn({index: count for index, count in enumerate(layers) if count})


def _insufficient(request: PlacementProblem, cuts: Sequence[Cut]) -> InsufficientMemoryError:
    tokens, devices = request.least_kv_tokens, request.devices
    needs = {
        devices[device].name: (request.costs.needed_bytes(first, last, tokens), devices[device].limit_bytes)
        for device, first, last in cuts
    }
    sizes = [cut.last - cut.first for cut in cuts]
    layers = ", ".join(
        f"{size} layer{'' if size == 1 else 's'} on {devices[cut.device].name}"
        for size, cut in zip(sizes, cuts, strict=True)
    )
    return lacking_memory(f"{request.model_name} does not fit with a KV cache of {tokens} tokens and {layers}", needs)


def _check(request: PlacementProblem, plan: PlacementPlan, strategy: str) -> None:
    """Raise `ValueError` for stages that are no way through the model, `InsufficientMemoryError` beyond a limit."""
    cuts = [Cut(stage.device_index, stage.first_layer, stage.last_layer) for stage in plan.stages]
    bounds = [0, *(cut.last for cut in cuts)]
    whole = bounds[-1] == request.costs.num_layers and all(
        cut.first == first < cut.last for first, cut in zip(bounds, cuts, strict=False)
    )
    known = len({cut.device for cut in cuts} & set(range(len(request.devices)))) == len(cuts)
    if not whole or not known or plan.kv_tokens < request.least_kv_tokens:
        raise ValueError(f"placement strategy {strategy!r} returned what is no plan: {plan}")
    held = replace(request, min_kv_tokens=plan.kv_tokens, max_kv_tokens=plan.kv_tokens)
    if plan != build_plan(held, plan.strategy, cuts):
        raise ValueError(f"placement strategy {strategy!r} returned a plan with wrong bytes: {plan}")


_STRATEGIES: dict[str, Strategy] = {"balanced": _balanced, "profiled": place_profiled, "vram": _vram}
