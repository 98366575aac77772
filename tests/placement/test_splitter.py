"""The `vram` strategy as a pure function."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.costs import DeviceProfile, LayerCosts, LinkTopology, PlacementDevice, PlacementPlan, PlacementProblem
from core.errors import InsufficientMemoryError
from core.placement.engine import place


def costs(layers: int = 8, *, tied: bool = False, layer_bytes: int = 100, kv: int = 2) -> LayerCosts:
    return LayerCosts(50, (layer_bytes,) * layers, 5, 50, tied, (kv,) * layers, 10, 20)


def split(model: LayerCosts, *limits: int, least: int = 10, most: int = 10**6, block: int = 1) -> PlacementPlan:
    profile = DeviceProfile("any", 1.0, ((1, 1.0),))
    devices = tuple(PlacementDevice(f"d{index}", limit, profile) for index, limit in enumerate(limits))
    problem = PlacementProblem(
        "m", model, devices, LinkTopology(), min_kv_tokens=least, max_kv_tokens=most, block_size=block
    )
    return place(problem, "vram")


def test_one_device_takes_everything() -> None:
    plan = split(costs(), 5000)
    assert [(s.first_layer, s.last_layer) for s in plan.stages] == [(0, 8)]
    assert plan.kv_tokens == (5000 - 50 - 800 - 5 - 50 - 30) // 16


def test_layers_follow_memory() -> None:
    plan = split(costs(9), 20000, 10000)
    assert [s.num_layers for s in plan.stages] == [6, 3]


def test_capping_kv_does_not_move_the_cuts() -> None:
    free, capped = split(costs(9), 20000, 10000), split(costs(9), 20000, 10000, most=16)
    assert [s.num_layers for s in free.stages] == [s.num_layers for s in capped.stages]
    assert capped.kv_tokens == 16


def test_tied_embeddings_cost_the_head_only_where_the_embedding_is_not() -> None:
    assert split(costs(tied=True), 5000).stages[0].weight_bytes == 50 + 800 + 5
    two = split(costs(tied=True), 3000, 3000)
    assert sum(s.weight_bytes for s in two.stages) == 50 + 800 + 5 + 50


def test_kv_comes_in_whole_blocks() -> None:
    assert split(costs(), 5000, block=16).kv_tokens % 16 == 0


def test_devices_beyond_the_layers_are_named_as_unused() -> None:
    plan = split(costs(2), 5000, 5000, 5000)
    assert len(plan.stages) == 2
    assert plan.unused_devices == ("d2",)


def test_what_does_not_fit_is_refused_with_the_bytes_each_device_lacks() -> None:
    with pytest.raises(InsufficientMemoryError) as caught:
        split(costs(), 300, 200)
    assert caught.value.lacking_bytes["d0"] > 0
    assert caught.value.lacking_bytes["d1"] > 0
    assert "d0 lacks" in caught.value.message


@settings(max_examples=200, deadline=None)
@given(
    layers=st.integers(1, 12),
    limits=st.lists(st.integers(100, 6000), min_size=1, max_size=4),
    layer_bytes=st.integers(1, 300),
    kv=st.integers(1, 9),
    tied=st.booleans(),
)
def test_plans_stay_within_every_budget_and_cover_all_layers(
    layers: int, limits: list[int], layer_bytes: int, kv: int, tied: bool
) -> None:
    model = costs(layers, tied=tied, layer_bytes=layer_bytes, kv=kv)
    try:
        plan = split(model, *limits)
    except InsufficientMemoryError:
        return
    assert plan.kv_tokens >= 10
    covered = [layer for stage in plan.stages for layer in range(stage.first_layer, stage.last_layer)]
    assert covered == list(range(layers))
    for stage in plan.stages:
        needed = model.needed_bytes(stage.first_layer, stage.last_layer, plan.kv_tokens)
        assert needed == stage.limit_bytes - stage.free_bytes
        assert needed <= stage.limit_bytes
