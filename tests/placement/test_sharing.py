"""Parts of one processor: what they cost each other in predictions, plans and numbers of cohorts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from core.costs import (
    Batch,
    DeviceProfile,
    LayerCosts,
    LinkTopology,
    PlacementDevice,
    PlacementProblem,
    Sharing,
    StageCost,
    StageTimer,
)
from core.costs.cost import at_once, best_cohorts, decode_tok_s, stage_s
from core.placement.engine import place, predicted_tok_s
from core.placement.predict import predict, stage_limit

COSTS = LayerCosts(
    embedding_bytes=0, layer_bytes=(1000,) * 8, after_bytes=0, head_bytes=0, tied=False,
    kv_bytes_per_token=(1,) * 8, layer_flops=(2000,) * 8, head_flops=0, hidden_bytes=0,
)  # fmt: skip
PART = DeviceProfile("cpu", 1e6, ((1, 1e7),), 1e-5, 2e-5, row_overhead_s=1e-6, sharing=Sharing("cpu", 2, 1.5, 2.0))
BATCH = Batch.decode(16, 10)


def stages(first: DeviceProfile, second: DeviceProfile) -> tuple[StageCost, StageCost]:
    return StageCost(replace(first, name="a"), 0, 4), StageCost(replace(second, name="b"), 4, 8)


def test_reading_and_computing_are_slowed_by_their_own_factors() -> None:
    crowded = PART.among(2)
    assert crowded.bandwidth_bytes_s == pytest.approx(1e6 / 1.5)
    assert crowded.flops_at(1) == pytest.approx(1e7 / 2.0)
    overheads = crowded.layer_overhead_s, crowded.step_overhead_s, crowded.row_overhead_s
    assert overheads == pytest.approx((1.5e-5, 3e-5, 2e-6))
    assert PART.among(1) == PART


def test_attention_to_kv_has_a_rate_of_its_own() -> None:
    slow = replace(PART, kv_bandwidth_bytes_s=1e5)
    kv = 16 * 10 * 4
    longer_s = stage_s(COSTS, slow, 0, 4, BATCH) - stage_s(COSTS, PART, 0, 4, BATCH)
    assert longer_s == pytest.approx(kv / 1e5 - kv / 1e6)
    assert slow.among(2).kv_bytes_s == pytest.approx(1e5 / 1.5)
    assert PART.among(2).kv_bytes_s == pytest.approx(1e6 / 1.5)


def test_every_further_part_costs_as_much() -> None:
    four = replace(PART, sharing=Sharing("cpu", 4, 2.5, 1.0))
    assert [1e6 / four.among(parts).bandwidth_bytes_s for parts in (1, 2, 3, 4)] == pytest.approx([1.0, 1.5, 2.0, 2.5])


def test_tokens_cost_something_beside_the_products() -> None:
    free = replace(PART, row_overhead_s=0.0)
    assert stage_s(COSTS, PART, 0, 4, BATCH) - stage_s(COSTS, free, 0, 4, BATCH) == pytest.approx(4 * 16 * 1e-6)
    dear = replace(PART, row_overhead_s=1.0)
    assert stage_limit(COSTS, StageCost(dear, 0, 4), BATCH) == "overhead"
    assert stage_limit(COSTS, StageCost(free, 0, 4), BATCH) == "compute"


def test_parts_of_other_processors_do_not_matter() -> None:
    other = replace(PART, sharing=Sharing("cuda:0", 2, 9.0, 9.0))
    alone = replace(PART, sharing=None)
    for pair in (stages(PART, other), stages(PART, alone)):
        assert at_once(pair) == tuple(replace(stage, device=stage.device.among(1)) for stage in pair)
        assert decode_tok_s(COSTS, pair, LinkTopology(), 32, 10, 2) == decode_tok_s(
            COSTS, stages(alone, alone), LinkTopology(), 32, 10, 2
        )


def test_one_step_at_a_time_is_not_slowed() -> None:
    alone, both = stages(replace(PART, sharing=None), replace(PART, sharing=None)), stages(PART, PART)
    one = [decode_tok_s(COSTS, pair, LinkTopology(), 32, 10, 1) for pair in (alone, both)]
    two = [decode_tok_s(COSTS, pair, LinkTopology(), 32, 10, 2) for pair in (alone, both)]
    assert one[0] == one[1]
    assert two[1] < two[0] / 1.5


def test_no_more_steps_are_put_in_flight_than_sharing_lets_gain() -> None:
    alone, both = stages(replace(PART, sharing=None), replace(PART, sharing=None)), stages(PART, PART)
    assert best_cohorts(COSTS, alone, LinkTopology(), 32, 10) == 2
    assert best_cohorts(COSTS, both, LinkTopology(), 32, 10) == 1


def test_the_prediction_is_for_parts_that_compute_at_once() -> None:
    slow = Sharing("cpu", 2, 1.25, 1.25)
    devices = tuple(PlacementDevice(name, 6000, replace(PART, name=name, sharing=slow)) for name in ("a", "b"))
    request = PlacementProblem("m", COSTS, devices, LinkTopology(), "throughput", 32, 10, max_kv_tokens=320)
    plan = place(request, "profiled")
    (rate,) = predict(plan, request, (32,)).rates
    assert rate.cohorts > 1 and rate.tok_s == predicted_tok_s(plan, request)
    for part, stage in zip(rate.parts, plan.stages, strict=False):
        profile = devices[stage.device_index].profile.among(2)
        batch = Batch.decode(-(-32 // rate.cohorts), 10)
        assert part.seconds == stage_s(COSTS, profile, stage.first_layer, stage.last_layer, batch)
        assert part.busy <= 1 + 1e-9
    assert rate.roofline_share < 1


def test_parts_that_cost_each_other_too_much_are_not_all_used() -> None:
    """Three devices as fast as each other; two of them are not while both compute."""
    crowded = replace(PART, sharing=Sharing("cpu", 2, 4.0, 4.0))
    profiles = (replace(PART, name="card", sharing=None), replace(crowded, name="a"), replace(crowded, name="b"))
    devices = tuple(PlacementDevice(profile.name, 6000, profile) for profile in profiles)
    request = PlacementProblem("m", COSTS, devices, LinkTopology(), "throughput", 32, 10, max_kv_tokens=320)
    layers = {stage.device_name: stage.num_layers for stage in place(request, "profiled").stages}
    assert layers == {"card": 4, "a": 4}
    free = replace(request, devices=tuple(replace(d, profile=replace(d.profile, sharing=None)) for d in devices))
    even = {stage.device_name: stage.num_layers for stage in place(free, "profiled").stages}
    assert sorted(even.values()) == [2, 3, 3]


def test_a_plan_gives_less_to_parts_that_share() -> None:
    costs = replace(COSTS, layer_bytes=(1000,) * 24, kv_bytes_per_token=(1,) * 24, layer_flops=(2000,) * 24)
    crowded = replace(PART, step_overhead_s=0.0, sharing=Sharing("cpu", 2, 1.5, 1.5))
    profiles = (replace(crowded, name="card", sharing=None), replace(crowded, name="a"), replace(crowded, name="b"))
    devices = tuple(PlacementDevice(profile.name, 18000, profile) for profile in profiles)
    request = PlacementProblem("m", costs, devices, LinkTopology(), "throughput", 32, 10, max_kv_tokens=320)
    layers = {stage.device_name: stage.num_layers for stage in place(request, "profiled").stages}
    assert layers == {"card": 10, "a": 7, "b": 7}


def test_a_stage_is_timed_beside_the_others_while_it_overlaps() -> None:
    timer = StageTimer(COSTS, PART, 0, 4, parts=2)
    assert timer.seconds(BATCH) == pytest.approx(stage_s(COSTS, PART, 0, 4, BATCH))
    assert timer.seconds(BATCH, at_once=True) == pytest.approx(stage_s(COSTS, PART.among(2), 0, 4, BATCH))
    single = StageTimer(COSTS, PART, 0, 4)
    assert single.seconds(BATCH, at_once=True) == single.seconds(BATCH)
