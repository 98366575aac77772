"""Which layers stream in: never a byte beyond a limit, nothing where all fits, as few bytes as can be, spread out."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.costs import PlacementDevice, PlacementProblem
from core.costs.cards import gpu_spec
from core.costs.cost import loaded_layers
from core.costs.plan import LayerCosts, PlacementPlan
from core.costs.profile import DeviceProfile, LinkProfile, LinkTopology
from core.devices import HOST
from core.errors import InsufficientMemoryError, InvalidRequestError
from core.placement.engine import predicted_tok_s
from core.placement.predict import one_more, predict
from core.placement.streamed_layers import choose_streamed, fewest_bytes, least_bytes, spread
from core.placement.streaming import place_fastest, place_or_stream

UNLIMITED = 1 << 60


def costs_of(sizes: tuple[int, ...], *, kv: int = 2, tied: bool = False) -> LayerCosts:
    number = len(sizes)
    return LayerCosts(50, sizes, 5, 50, tied, (kv,) * number, 10, 20, sizes, 100, hidden_bytes=16)


def device(name: str, limit: int, bandwidth: float = 1e3) -> PlacementDevice:
    return PlacementDevice(name, limit, DeviceProfile(name, bandwidth, ((1, 1e5),)))


def links(*names: str, bandwidth: float = 500.0) -> LinkTopology:
    return LinkTopology({(HOST, name): LinkProfile(bandwidth) for name in names}, LinkProfile(1e6, 1e-5))


def request_for(costs: LayerCosts, *devices: PlacementDevice, **fields: object) -> PlacementProblem:
    between = links(*(device.name for device in devices))
    request = PlacementProblem(
        "m", costs, devices, between, context=16, max_kv_tokens=64, block_size=4, host_bytes=UNLIMITED
    )
    return replace(request, **fields)  # type: ignore[arg-type]


def needed(costs: LayerCosts, first: int, last: int, kv_tokens: int, streamed: tuple[int, ...]) -> int:
    """Bytes on the device, worked out anew."""
    sizes = [costs.layer_bytes[layer] for layer in streamed]
    return costs.needed_bytes(first, last, kv_tokens) - sum(sizes) + 2 * max(sizes, default=0)


def check(plan: PlacementPlan, request: PlacementProblem) -> None:
    """Every byte of a plan."""
    costs = request.costs
    assert [x for s in plan.stages for x in range(s.first_layer, s.last_layer)] == list(range(costs.num_layers))
    assert plan.kv_tokens >= request.least_kv_tokens
    assert plan.kv_tokens % request.block_size == 0
    for stage in plan.stages:
        assert stage.limit_bytes == request.devices[stage.device_index].limit_bytes
        bytes_here = needed(costs, stage.first_layer, stage.last_layer, plan.kv_tokens, stage.streamed_layers)
        assert stage.weight_bytes + stage.kv_bytes + stage.workspace_bytes == bytes_here <= stage.limit_bytes
        assert stage.free_bytes >= 0
        sizes = [costs.layer_bytes[layer] for layer in stage.streamed_layers]
        assert (stage.slot_bytes, stage.streamed_bytes) == (max(sizes, default=0), sum(sizes))
        assert set(stage.streamed_layers) <= set(range(stage.first_layer, stage.last_layer))
    assert all(nbytes <= request.host_room(host) for host, nbytes in plan.streamed_by_host().items())


@pytest.mark.parametrize(
    ("room", "streamed"),
    [
        (800, ()),  # all of them
        (799, (1, 4, 6)),  # one slot more than they spare: three out, two slots in
        (700, (1, 4, 6)),
        (699, (1, 3, 5, 7)),
        (500, (0, 2, 4, 5, 7)),
        (200, tuple(range(8))),
        (199, None),
    ],
)
def test_as_many_as_need_be_at_even_distances(room: int, streamed: tuple[int, ...] | None) -> None:
    costs = costs_of((100,) * 8)
    others = costs.needed_bytes(0, 8, 4) - 800
    assert choose_streamed(costs, 0, 8, 4, others + room) == streamed


def test_the_layers_of_a_later_stage_have_their_own_numbers() -> None:
    costs = costs_of((100,) * 12)
    limit = costs.needed_bytes(4, 12, 0) - 150
    assert choose_streamed(costs, 4, 12, 0, limit) == (5, 7, 9, 11)


def test_layers_of_several_sizes_make_the_slots_as_large_as_the_largest_that_streams() -> None:
    assert fewest_bytes({100: 4, 10: 20}, 50) == {10: 7}
    assert fewest_bytes({100: 4, 10: 20}, 181) == {100: 3, 10: 9}
    assert fewest_bytes({100: 4, 10: 20}, 400) == {100: 4, 10: 20}
    assert fewest_bytes({100: 4, 10: 20}, 401) is None


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(1, 60))
def test_no_choice_streams_fewer_bytes(sizes: list[int], excess: int) -> None:
    counts = {size: sizes.count(size) for size in set(sizes)}
    found = fewest_bytes(counts, excess)
    sums = [
        sum(chosen)
        for number in range(1, len(sizes) + 1)
        for chosen in combinations(sizes, number)
        if sum(chosen) - 2 * max(chosen) >= excess
    ]
    assert (found is None) == (not sums)
    if found is not None:
        total = sum(size * number for size, number in found.items())
        assert total - 2 * max(found) >= excess
        assert all(0 < number <= counts[size] for size, number in found.items())
        assert total == min(sums) or len(counts) > 3


@given(st.integers(1, 60), st.data())
def test_spread_leaves_gaps_that_differ_by_one_at_most(number: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, number))
    chosen = spread(range(number), count)
    assert len(set(chosen)) == count
    assert 0 <= chosen[0] <= chosen[-1] < number
    gaps = [b - a for a, b in pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_layer_with_a_slot_to_itself_is_not_loaded_again() -> None:
    assert loaded_layers((1, 4)) == ()
    assert loaded_layers((1, 4, 6)) == (1, 6)
    assert loaded_layers((1, 3, 5, 7)) == (1, 3, 5, 7)


@st.composite
def requests(draw: st.DrawFn) -> tuple[PlacementProblem, str]:
    sizes = draw(st.lists(st.sampled_from((40, 100, 130)), min_size=2, max_size=14))
    costs = costs_of(tuple(sizes), kv=draw(st.integers(1, 4)), tied=draw(st.booleans()))
    number = draw(st.integers(1, 3))
    devices = [device(f"d{i}", draw(st.integers(150, 1500)), draw(st.sampled_from((5e2, 1e3)))) for i in range(number)]
    strategy = draw(st.sampled_from(("profiled", "vram", "balanced")))
    least = draw(st.integers(1, 24))
    request = request_for(
        costs, *devices, min_kv_tokens=least, max_kv_tokens=draw(st.integers(least, 90)),
        streams=draw(st.sampled_from((1, 4))), objective=draw(st.sampled_from(("latency", "throughput"))),
        host_bytes=draw(st.sampled_from((UNLIMITED, 900, 0))),
    )  # fmt: skip
    return request, strategy


@settings(max_examples=150)
@given(requests())
def test_plans_stay_within_every_budget_to_the_byte(drawn: tuple[PlacementProblem, str]) -> None:
    request, strategy = drawn
    try:
        plan = place_or_stream(request, strategy)
    except InsufficientMemoryError:
        return
    check(plan, request)
    whole = replace(request, host_bytes=0)
    try:
        assert place_or_stream(whole, strategy) == plan, "what fits does not stream"
    except InsufficientMemoryError:
        assert plan.streamed_bytes > 0 or strategy != "profiled", "another order of devices may hold all of it"
        for stage in plan.stages:  # not a layer more than this much KV needs
            least = choose_streamed(
                request.costs, stage.first_layer, stage.last_layer, plan.kv_tokens, stage.limit_bytes
            )
            assert stage.streamed_layers == least


@settings(max_examples=100)
@given(requests())
def test_what_cannot_work_is_refused_and_only_that(drawn: tuple[PlacementProblem, str]) -> None:
    """One device: it works if two slots, ends and the least KV fit."""
    request, strategy = drawn
    request = replace(request, devices=request.devices[:1], host_bytes=UNLIMITED)
    costs, limit = request.costs, request.devices[0].limit_bytes
    least = least_bytes(costs, 0, costs.num_layers, request.least_kv_tokens)
    if least <= limit:
        check(place_or_stream(request, strategy), request)
        return
    with pytest.raises(InsufficientMemoryError) as caught:
        place_or_stream(request, strategy)
    assert caught.value.lacking_bytes == {"d0": least - limit}


def test_layers_by_hand_keep_their_stages() -> None:
    costs = costs_of((100,) * 12)
    request = request_for(costs, device("a", 700), device("b", 500), layers=(7, 5))
    plan = place_or_stream(request)
    check(plan, request)
    assert [(stage.device_name, stage.num_layers) for stage in plan.stages] == [("a", 7), ("b", 5)]
    with pytest.raises(InvalidRequestError):
        place_or_stream(replace(request, layers=(7, 6)))


def test_main_memory_is_a_budget_too() -> None:
    costs = costs_of((100,) * 12)
    request = request_for(costs, device("a", 1100), min_kv_tokens=16, max_kv_tokens=16)
    plan = place_or_stream(request)
    assert place_or_stream(replace(request, host_bytes=plan.streamed_bytes)).streamed_bytes == plan.streamed_bytes
    with pytest.raises(InsufficientMemoryError, match="host lacks") as caught:
        place_or_stream(replace(request, host_bytes=plan.streamed_bytes - 300))
    assert caught.value.lacking_bytes == {"a": 0, HOST: 300}


def test_each_machine_streams_from_its_own_main_memory() -> None:
    costs = costs_of((100,) * 12)
    request = request_for(costs, device("a", 600), device("desk/a", 600), layers=(6, 6))
    request = replace(request, node_host_bytes={"desk": UNLIMITED})
    plan = place_or_stream(request)
    check(plan, request)
    streamed = plan.streamed_by_host()
    assert streamed.keys() == {HOST, "desk/host"} and sum(streamed.values()) == plan.streamed_bytes
    with pytest.raises(InsufficientMemoryError, match="desk/host lacks") as caught:
        place_or_stream(replace(request, node_host_bytes={"desk": streamed["desk/host"] - 100}))
    assert caught.value.lacking_bytes["desk/host"] == 100


@pytest.mark.parametrize("there", [False, True])
def test_layers_go_where_they_can_stream(there: bool) -> None:
    """One machine has main memory for them, and the other one none."""
    costs = costs_of((100,) * 12)
    request = request_for(costs, device("a", 600), device("desk/a", 600))
    room = {"host_bytes": 0, "node_host_bytes": {"desk": UNLIMITED}} if there else {}
    request = replace(request, **room)  # type: ignore[arg-type]
    plan = place_or_stream(request)
    check(plan, request)
    assert plan.streamed_by_host().keys() == {"desk/host" if there else HOST}
    assert {stage.device_name: bool(stage.streamed_layers) for stage in plan.stages if stage.streamed_layers} == {
        "desk/a" if there else "a": True
    }


def test_less_kv_is_promised_where_main_memory_would_not_hold_the_layers_otherwise() -> None:
    costs = costs_of((100,) * 12)
    request = request_for(costs, device("a", 1300), min_kv_tokens=4, max_kv_tokens=32, streams=2)
    generous = place_or_stream(request)
    tight = place_or_stream(replace(request, host_bytes=generous.streamed_bytes - 1))
    assert generous.kv_tokens == 32
    assert 4 <= tight.kv_tokens < 32


def test_the_faster_link_gets_more_of_what_streams() -> None:
    """Two devices alike but for their links to main memory: the one with the faster link holds more of the model."""
    costs = costs_of((100,) * 40)
    devices = (device("slow", 1000, 1e6), device("fast", 1000, 1e6))
    both = LinkTopology({**links("slow", bandwidth=100.0).links, **links("fast", bandwidth=1000.0).links})
    plan = place_or_stream(request_for(costs, *devices, links=both))
    layers = {stage.device_name: stage.num_layers for stage in plan.stages}
    assert layers["fast"] > layers["slow"]


@pytest.mark.parametrize("strategy", ["balanced", "vram"])
def test_profiled_is_no_slower_than_the_plain_cuts(strategy: str) -> None:
    costs = costs_of((100,) * 30)
    request = request_for(costs, device("a", 900), device("b", 700, 2e3), streams=4)
    plain = place_or_stream(request, strategy)
    alike = replace(request, min_kv_tokens=plain.kv_tokens, max_kv_tokens=plain.kv_tokens)
    assert predicted_tok_s(place_or_stream(alike), alike) >= predicted_tok_s(plain, alike)


def test_an_error_names_what_two_slots_lack() -> None:
    costs = costs_of((100,) * 12)
    request = request_for(costs, device("a", 300))
    least = least_bytes(costs, 0, 12, 4)
    with pytest.raises(InsufficientMemoryError, match=f"a lacks {least - 300} B: it needs"):
        place_or_stream(request)


def test_a_prediction_names_the_link_and_one_more_card_may_end_the_streaming() -> None:
    costs = costs_of((100,) * 24)
    request = request_for(costs, device("a", 1500))
    plan = place_or_stream(request)
    (rate,) = predict(plan, request, (1,)).rates
    assert rate.bottleneck.name == "host -> a"
    assert rate.bottleneck.limited_by == "link"
    loads_s = sum(costs.layer_bytes[layer] for layer in plan.stages[0].streamed_layers) / 500
    assert rate.token_s == pytest.approx(loads_s)
    assert rate.roofline_share == pytest.approx(1.0)
    effect = one_more(plan, request, device("b", 5000))
    assert effect.gain is not None
    assert effect.gain > 0.2
    assert place_fastest(request) == plan


def test_a_plan_without_a_machine_streams_at_the_links_default_speed() -> None:
    costs = costs_of((2**30,) * 40)
    request = replace(
        request_for(costs, *gpu_spec("3090")), links=LinkTopology(default=LinkProfile(11.6e9, 3e-5)), context=2048
    )
    plan = place_or_stream(request)
    check(plan, request)
    (rate,) = predict(plan, request, (1,)).rates
    streamed = len(plan.stages[0].streamed_layers)
    assert rate.token_s == pytest.approx(streamed * (2**30 / 11.6e9 + 3e-5), rel=0.01)
