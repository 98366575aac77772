"""Strategies: what they place where, and that `profiled` is the fastest of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.costs import PlacementDevice, PlacementProblem
from core.costs.cards import gpu_spec
from core.costs.plan import LayerCosts, Objective, PlacementPlan
from core.costs.profile import DeviceProfile, LinkProfile, LinkTopology
from core.errors import InsufficientMemoryError, InvalidRequestError
from core.placement import engine
from core.placement.engine import (
    build_plan,
    parse_layers,
    place,
    place_profiled,
    predicted_tok_s,
    register_strategy,
    strategies,
)
from core.placement.programme import Cut

STAGED = LinkTopology(default=LinkProfile(11.6e9, 3e-5))


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_STRATEGIES", dict(engine._STRATEGIES))


def small(num_layers: int = 8, *, tied: bool = False) -> LayerCosts:
    return LayerCosts(
        50, (100,) * num_layers, 5, 50, tied, (2,) * num_layers, 10, 20, (200,) * num_layers, 100, hidden_bytes=16
    )


def large(num_layers: int, hidden: int, inner: int, kv: int, vocab: int = 128_000) -> LayerCosts:
    """A bf16 model."""
    layer = 2 * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    return LayerCosts(
        embedding_bytes=2 * vocab * hidden,
        layer_bytes=(layer,) * num_layers,
        after_bytes=2 * hidden,
        head_bytes=2 * vocab * hidden,
        tied=False,
        kv_bytes_per_token=(4 * kv,) * num_layers,
        workspace_bytes=300 * 2**20,
        head_workspace_bytes=100 * 2**20,
        layer_flops=(layer,) * num_layers,
        head_flops=2 * vocab * hidden,
        hidden_bytes=2 * hidden,
    )


EIGHT_B = large(32, 4096, 14336, 1024)
FOURTEEN_B = large(40, 5120, 17408, 1024)


def device(name: str, limit: int, bandwidth: float = 1e3) -> PlacementDevice:
    return PlacementDevice(name, limit, DeviceProfile(name, bandwidth, ((1, 1e5),), 0.01, 0.1))


def request_for(costs: LayerCosts, *devices: PlacementDevice, most: int = 64, **fields: object) -> PlacementProblem:
    request = PlacementProblem("m", costs, devices, STAGED, context=16, max_kv_tokens=most, block_size=4)
    return replace(request, **fields)  # type: ignore[arg-type]


def layers_by_device(plan: PlacementPlan) -> dict[str, int]:
    return {stage.device_name: stage.num_layers for stage in plan.stages}


def check_plan(plan: PlacementPlan, request: PlacementProblem) -> None:
    costs = request.costs
    assert [layer for s in plan.stages for layer in range(s.first_layer, s.last_layer)] == list(range(costs.num_layers))
    assert request.min_kv_tokens <= plan.kv_tokens < request.max_kv_tokens + request.block_size
    assert plan.kv_tokens % request.block_size == 0
    used = {stage.device_index: stage for stage in plan.stages}
    assert len(used) == len(plan.stages)
    assert plan.unused_devices == tuple(d.name for index, d in enumerate(request.devices) if index not in used)
    for index, stage in used.items():
        assert (stage.device_name, stage.limit_bytes) == (
            request.devices[index].name,
            request.devices[index].limit_bytes,
        )
        needed = costs.needed_bytes(stage.first_layer, stage.last_layer, plan.kv_tokens)
        assert needed == stage.limit_bytes - stage.free_bytes <= stage.limit_bytes


def test_the_built_in_strategies_are_known_by_name() -> None:
    assert strategies() == ("balanced", "profiled", "vram")
    with pytest.raises(InvalidRequestError, match="balanced, profiled, vram") as caught:
        place(request_for(small(), device("a", 5000)), "fastest")
    assert caught.value.param == "placement"


@pytest.mark.parametrize("strategy", ["balanced", "profiled", "vram"])
def test_one_device_takes_everything(strategy: str) -> None:
    request = request_for(small(), device("a", 5000))
    plan = place(request, strategy)
    assert (plan.model_name, plan.strategy, layers_by_device(plan)) == ("m", strategy, {"a": 8})
    check_plan(plan, request)


def test_vram_is_the_split_by_memory() -> None:
    plan = place(request_for(small(9), device("a", 20000), device("b", 10000)), "vram")
    assert list(layers_by_device(plan).items()) == [("a", 6), ("b", 3)]


def test_balanced_gives_every_device_as_many_layers_and_what_is_left_to_the_roomy_ones() -> None:
    request = request_for(small(9), device("a", 3000), device("b", 8000))
    assert list(layers_by_device(place(request, "balanced")).items()) == [("a", 4), ("b", 5)]


def test_balanced_leaves_the_smallest_device_out_where_an_even_share_does_not_fit() -> None:
    request = request_for(small(9), device("a", 2000), device("b", 300), device("c", 2000))
    plan = place(request, "balanced")
    assert layers_by_device(plan) == {"a": 5, "c": 4}
    assert plan.unused_devices == ("b",)


def test_profiled_puts_layers_where_they_are_fast() -> None:
    request = request_for(small(), device("slow", 5000, 500.0), device("fast", 5000, 2000.0))
    plan = place(request)
    assert layers_by_device(plan) == {"fast": 8}
    assert plan.unused_devices == ("slow",)
    assert plan.stages[0].device_index == 1


def test_profiled_shares_the_work_out_for_throughput() -> None:
    devices = (device("slow", 20000, 1000.0), device("fast", 20000, 2000.0))
    request = request_for(small(12), *devices, objective="throughput", streams=4, most=512, context=100)
    shared = layers_by_device(place(request))
    assert shared == {"slow": 4, "fast": 8}
    assert len(layers_by_device(place(replace(request, objective="latency")))) == 1


def test_the_order_of_stages_follows_the_links() -> None:
    devices = tuple(device(name, 480) for name in "abc")
    slow, fast = LinkProfile(1.0, 5.0), LinkProfile(1e6)
    links = LinkTopology({("c", "a"): fast, ("a", "b"): fast}, slow)
    plan = place(request_for(small(9), *devices, links=links, min_kv_tokens=4, most=4, context=4))
    assert [stage.device_name for stage in plan.stages] == ["c", "a", "b"]
    assert [stage.device_index for stage in plan.stages] == [2, 0, 1]


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_a_weak_card_that_is_not_needed_is_left_out(objective: Objective) -> None:
    devices = gpu_spec("3090", "2060")
    request = PlacementProblem("8B", EIGHT_B, devices, STAGED, objective, 8, 2048, 512, 10**6)
    plan = place(request)
    assert plan.unused_devices == ("RTX 2060",)
    assert plan.kv_tokens >= 8 * 2048
    assert predicted_tok_s(plan, request) > 1.2 * predicted_tok_s(place(request, "vram"), request)


def test_a_weak_card_is_used_where_its_memory_is_needed() -> None:
    request = PlacementProblem("14B", FOURTEEN_B, gpu_spec("3090", "2060*2"), STAGED, context=1024, max_kv_tokens=1024)
    assert len(place(request).stages) == 3
    wanted = PlacementProblem("8B", EIGHT_B, gpu_spec("3090", "2060"), STAGED, max_kv_tokens=100_000)
    assert place(wanted).unused_devices == ()
    assert place(wanted).kv_tokens >= 100_000


def test_kv_that_does_not_fit_is_cut_to_what_the_streams_need_then_to_what_fits() -> None:
    devices = (device("fast", 1500, 4000.0), device("slow", 1500, 100.0))
    request = request_for(small(), *devices, min_kv_tokens=4, most=10**6)
    needed = place(request)
    assert layers_by_device(needed) == {"fast": 8}
    assert needed.kv_tokens == (1500 - 50 - 800 - 5 - 50 - 30) // 16 // 4 * 4 >= request.context
    many = place(replace(request, streams=100))
    assert len(many.stages) == 2
    with pytest.raises(InsufficientMemoryError):
        place(replace(request, min_kv_tokens=many.kv_tokens + 4))
    check_plan(many, request)


@pytest.mark.parametrize("strategy", ["balanced", "profiled", "vram"])
def test_what_does_not_fit_is_refused_with_the_bytes_that_devices_lack(strategy: str) -> None:
    request = request_for(small(), device("a", 300), device("b", 200))
    with pytest.raises(InsufficientMemoryError, match="lacks") as caught:
        place(request, strategy)
    assert caught.value.lacking_bytes["b"] > 0


def test_layers_by_hand_are_the_plan() -> None:
    devices = (device("a", 3000), device("b", 3000), device("c", 3000))
    request = request_for(small(), *devices, layers=(5, 3))
    plan = place(request, "vram")
    assert (plan.strategy, plan.unused_devices) == ("by hand", ("c",))
    assert list(layers_by_device(plan).items()) == [("a", 5), ("b", 3)]
    check_plan(plan, request)
    plan = place(replace(request, layers=(2, 0, 6)))
    assert [(stage.device_index, stage.num_layers) for stage in plan.stages] == [(0, 2), (2, 6)]


@pytest.mark.parametrize("layers", [(5, 4), (8, 0, 0, 0), (9, -1), (), (0, 0, 0)])
def test_layers_by_hand_have_to_be_the_models(layers: tuple[int, ...]) -> None:
    devices = (device("a", 3000), device("b", 3000), device("c", 3000))
    with pytest.raises(InvalidRequestError, match="has 8 layers for at most 3") as caught:
        place(request_for(small(), *devices, layers=layers))
    assert caught.value.param == "layers"


def test_layers_by_hand_have_to_fit() -> None:
    request = request_for(small(), device("a", 3000), device("b", 300), layers=(4, 4), min_kv_tokens=8)
    with pytest.raises(
        InsufficientMemoryError, match="4 layers on a, 4 layers on b: b lacks 249 B: it needs"
    ) as caught:
        place(request)
    assert caught.value.lacking_bytes == {"a": 0, "b": 249}


@pytest.mark.parametrize("text", ["", "20,", "20;12", "-1,9", "1.5", "²", "a"])
def test_layers_are_written_as_numbers(text: str) -> None:
    assert parse_layers("20, 12") == (20, 12)
    with pytest.raises(InvalidRequestError, match="20,12"):
        parse_layers(text)


def test_a_strategy_of_ones_own() -> None:
    def last_only(request: PlacementProblem) -> PlacementPlan:
        return build_plan(request, "last-only", [Cut(len(request.devices) - 1, 0, request.costs.num_layers)])

    register_strategy("last-only", last_only)
    assert "last-only" in strategies()
    request = request_for(small(), device("a", 3000), device("b", 3000))
    plan = place(request, "last-only")
    assert (plan.strategy, layers_by_device(plan), plan.unused_devices) == ("last-only", {"b": 8}, ("a",))
    with pytest.raises(InsufficientMemoryError):
        place(replace(request, devices=(device("a", 3000), device("b", 30))), "last-only")
    for name in ("last-only", "vram", "By Hand", ""):
        with pytest.raises(ValueError, match="taken or no name"):
            register_strategy(name, last_only)


def test_what_a_strategy_of_ones_own_returns_is_checked() -> None:
    request = request_for(small(), device("a", 3000), device("b", 3000))
    good = build_plan(request, "mine", [Cut(0, 0, 4), Cut(1, 4, 8)])
    one, two = good.stages
    wrong = (
        replace(good, stages=(one,)),
        replace(good, stages=(two, one)),
        replace(good, stages=(one, replace(two, device_index=0))),
        replace(good, stages=(one, replace(two, device_index=7))),
        replace(good, stages=(one, replace(two, kv_bytes=0))),
        replace(good, kv_tokens=0),
    )
    answers = iter(wrong)
    register_strategy("mine", lambda _: next(answers))
    for _ in wrong:
        with pytest.raises(ValueError, match="'mine' returned"):
            place(request, "mine")
    register_strategy("greedy", lambda _: replace(good, kv_tokens=10**6))
    with pytest.raises(InsufficientMemoryError):
        place(request, "greedy")


def test_required_devices_are_used() -> None:
    request = request_for(small(), device("slow", 5000, 500.0), device("fast", 5000, 2000.0))
    plan = place_profiled(request, required=frozenset({0}))
    assert layers_by_device(plan)["slow"] == 1
    with pytest.raises(InsufficientMemoryError):
        place_profiled(replace(request, devices=(device("tiny", 5), *request.devices)), required=frozenset({0}))


@pytest.mark.parametrize(
    "fields",
    [
        {"devices": ()},
        {"devices": (device("a", 5), device("a", 5))},
        {"streams": 0},
        {"min_kv_tokens": 65},
    ],
)
def test_requests_that_cannot_be_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"devices|at least|less than"):
        request_for(small(), device("b", 5000), **fields)


def test_a_device_lends_its_name_to_its_profile() -> None:
    assert PlacementDevice("gpu", 1, DeviceProfile("other", 1.0, ((1, 1.0),))).profile.name == "gpu"


@settings(max_examples=60)
@given(data=st.data(), objective=st.sampled_from(("latency", "throughput")))
def test_profiled_is_never_worse_than_the_others(data: st.DataObject, objective: Objective) -> None:
    costs = small(data.draw(st.integers(1, 12)), tied=data.draw(st.booleans()))
    whole = costs.needed_bytes(0, costs.num_layers, 64)
    devices = tuple(
        device(f"d{index}", whole * data.draw(st.integers(2, 12)) // 10, data.draw(st.floats(50.0, 5000.0)))
        for index in range(data.draw(st.integers(1, 4)))
    )
    links = LinkTopology(default=LinkProfile(data.draw(st.floats(10.0, 1e5)), data.draw(st.floats(0.0, 1.0))))
    streams = data.draw(st.integers(1, 20))
    most = data.draw(st.sampled_from((8, 64, 1000)))
    request = request_for(costs, *devices, most=most, links=links, objective=objective, streams=streams)
    try:
        plan = place(request)
    except InsufficientMemoryError:
        for strategy in ("vram", "balanced"):
            with pytest.raises(InsufficientMemoryError):
                place(request, strategy)
        return
    check_plan(plan, request)
    for strategy in ("vram", "balanced"):
        try:
            other = place(request, strategy)
        except InsufficientMemoryError:
            continue
        check_plan(other, request)
        if other.kv_tokens >= min(plan.kv_tokens, request.needed_kv_tokens):
            assert predicted_tok_s(plan, request) >= predicted_tok_s(other, request) * (1 - 1e-8)


@settings(max_examples=40)
@given(data=st.data())
def test_profiled_for_throughput_is_close_to_the_best_of_all(data: st.DataObject) -> None:
    costs = small(data.draw(st.integers(2, 6)))
    devices = tuple(device(f"d{index}", 5000, data.draw(st.floats(100.0, 2000.0))) for index in range(2))
    links = LinkTopology(default=LinkProfile(data.draw(st.floats(50.0, 1e5)), data.draw(st.floats(0.0, 0.3))))
    streams = data.draw(st.integers(1, 12))
    request = request_for(costs, *devices, links=links, objective="throughput", streams=streams, context=50, most=50)
    halves = [[Cut(a, 0, cut), Cut(1 - a, cut, costs.num_layers)] for a in (0, 1) for cut in range(1, costs.num_layers)]
    every = [*halves, *([Cut(index, 0, costs.num_layers)] for index in (0, 1))]
    best = max(predicted_tok_s(build_plan(request, "any", cuts), request) for cuts in every)
    assert predicted_tok_s(place(request), request) >= 0.97 * best
