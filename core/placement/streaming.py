"""Plans for models that do not fit on the devices: some layers stay in main memory and stream in.

How many, and which, `core.placement.streamed_layers` says for one stage. What is read per pass does not depend on how
many sequences share it. So the KV that the streams of the plan need (`PlacementProblem.needed_kv_tokens`) comes before
keeping layers on the device; further KV does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from core.costs import PlacementPlan, PlacementProblem
from core.errors import InsufficientMemoryError
from core.placement.engine import BY_HAND, assemble, cuts_by_hand, kv_room, place_profiled, plan_stage, predicted_tok_s
from core.placement.pooled import place_pooled
from core.placement.programme import Cut
from core.placement.search import lacking_memory, largest
from core.placement.stream_search import StreamingSearch, streaming_cuts
from core.placement.streamed_layers import choose_streamed, least_bytes


def place_or_stream(
    request: PlacementProblem, strategy: str = "profiled", lend_ratio: float = 0.0, least_tokens: int = 0
) -> PlacementPlan:
    """`place_pooled`; where the model does not fit and there is main memory (`request.may_stream`), layers stream in.

    Raises what `place` raises; `InsufficientMemoryError` if it does not fit even so.
    """
    try:
        return place_pooled(request, strategy, lend_ratio, least_tokens)
    except InsufficientMemoryError:
        if not request.may_stream:
            raise
    return place_streaming(request, strategy)


def place_fastest(
    request: PlacementProblem, *, required: frozenset[int] = frozenset(), least_kv_tokens: int | None = None
) -> PlacementPlan:
    """`place_profiled`, and as `place_or_stream` where the model does not fit."""
    try:
        return place_profiled(request, required=required, least_kv_tokens=least_kv_tokens)
    except InsufficientMemoryError:
        if not request.may_stream:
            raise
    return _place_searched(request, "profiled", required, least_kv_tokens)


def place_streaming(request: PlacementProblem, strategy: str = "profiled") -> PlacementPlan:
    """A plan with streamed layers. Layers by hand keep their stages; `vram` cuts in proportion to memory, `balanced`
    evenly; where that does not fit, and for all other strategies, the fastest cuts are searched.

    Raises:
        InsufficientMemoryError: two slots, ends and `min_kv_tokens` do not fit, or main memory is too small for the
            layers that would stay there; says what each lacks.
    """
    if request.layers is not None:
        cuts = cuts_by_hand(request, request.layers)
        return build_streaming(request, BY_HAND, cuts, _most_tokens(request, cuts))
    for cuts in _plain_cuts(request, strategy):
        if _fits(request, cuts, request.least_kv_tokens):
            plan = build_streaming(request, strategy, cuts, _most_tokens(request, cuts))
            if not _lacking_hosts(request, plan.streamed_by_host()):
                return plan
    return _place_searched(request, strategy, frozenset(), None)


def build_streaming(request: PlacementProblem, strategy: str, cuts: Sequence[Cut], kv_tokens: int) -> PlacementPlan:
    """The plan with these stages. Layers are streamed as far as `kv_tokens` tokens of KV need the room; what is left of
    it becomes KV too, up to what is wanted.

    Raises:
        InsufficientMemoryError: they do not fit; says what each device, and "host" (on a node, "node/host"), lacks.
    """
    stages = []
    for cut in cuts:
        layers = choose_streamed(request.costs, cut.first, cut.last, kv_tokens, _limit(request, cut.device))
        if layers is None:
            raise _insufficient(request, cuts, kv_tokens)
        stages.append(plan_stage(request, cut, layers))
    rooms = [kv_room(request, stage) for stage in stages]
    plan = assemble(request, strategy, stages, min([max(kv_tokens, request.wanted_kv_tokens), *rooms]))
    lacking = _lacking_hosts(request, plan.streamed_by_host())
    if lacking:
        raise _insufficient(request, cuts, kv_tokens, lacking)
    return plan


def _lacking_hosts(request: PlacementProblem, streamed: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Main memories that have too little for the layers that would stay there: what is needed and what there is."""
    rooms = {host: (nbytes, request.host_room(host)) for host, nbytes in streamed.items()}
    return {host: (needed, room) for host, (needed, room) in rooms.items() if needed > room}


def _limit(request: PlacementProblem, device: int) -> int:
    return request.devices[device].limit_bytes


def _place_searched(
    request: PlacementProblem, strategy: str, required: frozenset[int], least_kv_tokens: int | None
) -> PlacementPlan:
    """The fastest of the searched cuts and the plain ones that holds as much KV as any of them can, or
    `least_kv_tokens`."""
    search = StreamingSearch(request, required)
    least = request.least_kv_tokens if least_kv_tokens is None else least_kv_tokens
    most = max(least, request.needed_kv_tokens) if least_kv_tokens is None else least
    tokens = search.most_kv_tokens(least, most, request.block_size)
    refused: InsufficientMemoryError | None = None
    for assured in () if tokens is None else sorted({tokens, least}, reverse=True):
        plans: list[PlacementPlan] = []
        candidates = [*streaming_cuts(request, search, assured), *_plain_cuts(request, "vram")]
        for cuts in [*candidates, *_plain_cuts(request, "balanced")]:
            if required <= {cut.device for cut in cuts} and _fits(request, cuts, assured):
                try:
                    plans.append(build_streaming(request, strategy, cuts, assured))
                except InsufficientMemoryError as error:  # main memory
                    refused = error
        if plans:
            return max(plans, key=lambda plan: predicted_tok_s(plan, request))
    raise refused or _insufficient(request, next(iter(_plain_cuts(request, "vram"))), least)


def _plain_cuts(request: PlacementProblem, strategy: str) -> list[list[Cut]]:
    """Every device in the order given: in proportion to memory, or evenly on as many as possible."""
    limits = [device.limit_bytes for device in request.devices]
    if strategy == "vram":
        return [_cuts(request, range(len(limits)), limits)]
    if strategy == "balanced":
        roomy = sorted(range(len(limits)), key=lambda index: -limits[index])
        return [_cuts(request, sorted(roomy[:number]), [1] * len(limits)) for number in range(len(limits), 0, -1)]
    return []


def _cuts(request: PlacementProblem, used: Sequence[int], weights: Sequence[int]) -> list[Cut]:
    """Layers in proportion to `weights`, at least one each."""
    num_layers = request.costs.num_layers
    used = list(used)[:num_layers]
    shares = list(accumulate(max(1, weights[index]) for index in used))
    cuts, first = [], 0
    for turn, index in enumerate(used):
        following = len(used) - turn - 1
        share = (2 * num_layers * shares[turn] + shares[-1]) // (2 * shares[-1])
        last = num_layers if following == 0 else max(first + 1, min(share, num_layers - following))
        cuts.append(Cut(index, first, last))
        first = last
    return cuts


def _fits(request: PlacementProblem, cuts: Sequence[Cut], kv_tokens: int) -> bool:
    costs = request.costs
    return all(least_bytes(costs, cut.first, cut.last, kv_tokens) <= _limit(request, cut.device) for cut in cuts)


def _most_tokens(request: PlacementProblem, cuts: Sequence[Cut]) -> int:
    """What the streams need of KV, or as much of it as fits, but at least `least_kv_tokens`."""
    block = request.block_size
    least, most = request.least_kv_tokens // block, request.needed_kv_tokens // block
    return largest(lambda blocks: _fits(request, cuts, blocks * block), least, most) * block


def _insufficient(
    request: PlacementProblem, cuts: Sequence[Cut], kv_tokens: int, hosts: Mapping[str, tuple[int, int]] | None = None
) -> InsufficientMemoryError:
    needs = {
        request.devices[device].name: (least_bytes(request.costs, first, last, kv_tokens), _limit(request, device))
        for device, first, last in cuts
    }
    return lacking_memory(
        f"{request.model_name} does not fit with a KV cache of {kv_tokens} tokens, not even with layers that stream in "
        "from main memory",
        needs | dict(hosts or {}),
    )
