"""What is said of a plan, and of devices beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from core.costs import PlacementDevice, PlacementProblem
from core.costs.cost import Batch, StageCost, best_cohorts, decode_tok_s, pipeline_s, stage_s
from core.costs.plan import LayerCosts
from core.costs.profile import DeviceProfile, LinkProfile, LinkTopology
from core.placement.engine import place, predicted_tok_s, stage_costs
from core.placement.predict import DeviceEffect, Prediction, one_more, predict, stage_limit

COSTS = LayerCosts(
    embedding_bytes=400,
    layer_bytes=(1000,) * 8,
    after_bytes=10,
    head_bytes=400,
    tied=False,
    kv_bytes_per_token=(2,) * 8,
    layer_flops=(2000,) * 8,
    head_flops=800,
    hidden_bytes=64,
)
LINK = LinkProfile(1e6, 1e-4)


def device(name: str, limit: int = 20_000, bandwidth: float = 1e6, flops: float = 1e8) -> PlacementDevice:
    return PlacementDevice(name, limit, DeviceProfile(name, bandwidth, ((1, flops),), 1e-6, 2e-6))


def request_for(*devices: PlacementDevice, **fields: object) -> PlacementProblem:
    links = LinkTopology(default=LINK)
    request = PlacementProblem("m", COSTS, devices, links, streams=4, context=50, max_kv_tokens=256)
    return replace(request, **fields)  # type: ignore[arg-type]


def predicted(request: PlacementProblem, strategy: str = "profiled", **fields: int) -> Prediction:
    return predict(place(request, strategy), request, **fields)


def test_rates_are_those_of_the_cost_model() -> None:
    request = request_for(device("a"), device("b", bandwidth=5e5))
    plan = place(request, "balanced")
    stages, links = stage_costs(plan, request), request.links
    prediction = predict(plan, request, (1, 3, 8), 70)
    assert prediction.context == 70
    for rate in prediction.rates:
        assert rate.cohorts == best_cohorts(COSTS, stages, links, rate.streams, 70)
        assert rate.tok_s == decode_tok_s(COSTS, stages, links, rate.streams, 70, rate.cohorts)
        assert rate.token_s == pytest.approx(rate.streams / rate.tok_s)
        assert 0 < rate.roofline_share < 1
    assert [rate.streams for rate in prediction.rates] == [1, 3, 8]
    assert prediction == predict(plan, replace(request, context=70), (1, 3, 8))


def test_parts_are_the_stages_and_links_of_a_cohort() -> None:
    request = request_for(device("a"), device("b"))
    plan = place(request, "balanced")
    (rate,) = predict(plan, request, (7,)).rates
    compute, hops = pipeline_s(
        COSTS, stage_costs(plan, request), request.links, Batch.decode(-(-7 // rate.cohorts), 50)
    )
    assert tuple(part.seconds for part in rate.parts) == compute + hops
    assert [part.name for part in rate.parts] == ["a", "b", "a -> b"]
    assert [part.layers for part in rate.parts] == [(0, 4), (4, 8), None]
    assert sum(part.share for part in rate.parts) == pytest.approx(1)
    assert all(0 < part.busy <= 1 + 1e-9 for part in rate.parts)
    assert rate.bottleneck is rate.parts[1]


def test_a_stage_that_no_one_waits_for_is_busy_all_the_time() -> None:
    heavy = replace(COSTS, layer_flops=(10**7,) * 8)
    request = request_for(device("a"), device("b"), costs=heavy)
    (rate,) = predicted(request, "balanced", streams=(8,)).rates
    assert rate.cohorts > 1
    assert max(part.busy for part in rate.parts) == pytest.approx(1)
    (alone,) = predicted(request_for(device("a")), streams=(8,)).rates
    assert (alone.cohorts, alone.parts[0].busy) == (1, pytest.approx(1))


@pytest.mark.parametrize(
    ("profile", "batch", "limit"),
    [
        (DeviceProfile("d", 1e6, ((1, 1e8),)), Batch.decode(1, 10), "bandwidth"),
        (DeviceProfile("d", 1e6, ((1, 1e12),)), Batch.decode(100, 1000), "bandwidth"),
        (DeviceProfile("d", 1e6, ((1, 1e8),)), Batch.decode(1000, 1), "compute"),
        (DeviceProfile("d", 1e6, ((1, 1e8),), 1.0), Batch.decode(1, 10), "overhead"),
        (DeviceProfile("d", 1e6, ((1, 1e8),), 0.0, 1.0), Batch.decode(1, 10), "overhead"),
    ],
)
def test_a_stage_is_limited_by_what_most_of_its_time_goes_to(profile: DeviceProfile, batch: Batch, limit: str) -> None:
    assert stage_limit(COSTS, StageCost(profile, 2, 8), batch) == limit


def test_a_slow_link_is_the_bottleneck() -> None:
    request = request_for(device("a", 6000), device("b", 6000), links=LinkTopology(default=LinkProfile(1e6, 1.0)))
    bottleneck = predicted(request).rates[0].bottleneck
    assert (bottleneck.limited_by, bottleneck.layers) == ("link", None)
    assert bottleneck.name in ("a -> b", "b -> a")


def test_no_more_tokens_per_second_than_a_link_carries() -> None:
    thin = LinkTopology(default=LinkProfile(1e4))
    (rate,) = predicted(request_for(device("a"), device("b"), links=thin), "balanced", streams=(64,)).rates
    assert rate.tok_s <= 1e4 / COSTS.hidden_bytes
    assert rate.bottleneck.busy == pytest.approx(1)


def test_the_floor_is_every_byte_at_full_bandwidth() -> None:
    request = request_for(device("a"), device("b", bandwidth=5e5))
    prediction = predicted(request, "balanced")
    layers, ends, kv = 4 * 1000, 410, 50 * 2 * 4
    assert prediction.floor_s == pytest.approx((layers + kv) / 1e6 + (layers + ends + kv) / 5e5)
    assert prediction.rates[0].roofline_tok_s == pytest.approx(1 / prediction.floor_s)


def test_a_device_without_overheads_reaches_the_roofline() -> None:
    ideal = PlacementDevice("a", 20_000, DeviceProfile("a", 1e6, ((1, 1e12),)))
    rate = predicted(request_for(ideal)).rates[0]
    assert rate.roofline_share == pytest.approx(1)
    assert rate.tok_s == pytest.approx(1 / stage_s(COSTS, ideal.profile, 0, 8, Batch.decode(1, 50)))


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_a_device_that_is_left_out_would_have_cost_speed(objective: str) -> None:
    request = request_for(device("fast"), device("slow", bandwidth=1e4), objective=objective)
    plan = place(request)
    assert plan.unused_devices == ("slow",)
    (effect,) = predict(plan, request).unused
    assert effect.name == "slow"
    assert effect.tok_s_without == pytest.approx(predicted_tok_s(plan, request))
    assert effect.gain is not None and effect.gain < -0.5
    assert effect.tok_s == pytest.approx(effect.tok_s_without * (1 + effect.gain))
    assert effect.kv_tokens >= plan.kv_tokens


def test_a_device_that_holds_not_a_layer_brings_nothing() -> None:
    request = request_for(device("fast"), device("tiny", 500))
    (effect,) = predicted(request).unused
    assert effect == DeviceEffect("tiny", None, effect.tok_s_without, 0)
    assert effect.gain is None


def test_nothing_is_left_out_nothing_to_say() -> None:
    assert predicted(request_for(device("a"))).unused == ()


def test_one_more_fast_device_brings_speed_and_a_slow_one_nothing() -> None:
    request = request_for(device("a", 6000), device("b", 6000, 5e5))
    plan = place(request)
    faster = one_more(plan, request, device("c", 20_000, 4e6))
    assert faster.gain is not None and faster.gain > 1
    assert faster.tok_s_without == pytest.approx(predicted_tok_s(plan, request))
    slower = one_more(plan, request, device("a", 6000, 1e3))
    assert (slower.name, slower.gain) == ("a", 0)


def test_one_more_device_has_the_slowest_link_that_is_known() -> None:
    request = request_for(device("a", 6000), device("b", 6000, 5e5))
    apart = LinkTopology({("a", "b"): LinkProfile(1.0, 1.0), ("b", "a"): LINK}, LINK)
    plan = place(replace(request, links=apart))
    joined = one_more(plan, request, device("c", 6000, 2e6))
    assert joined.gain is not None and joined.gain > 0.1
    assert one_more(plan, replace(request, links=apart), device("c", 6000, 2e6)).gain == 0


def test_plans_of_every_strategy_are_predicted() -> None:
    request = request_for(device("a"), device("b"), device("c"), objective="throughput")
    by_hand = replace(request, layers=(0, 3, 5))
    for plan, asked in ((place(request, "vram"), request), (place(by_hand), by_hand)):
        prediction = predict(plan, asked)
        assert len(prediction.unused) == len(plan.unused_devices)
        assert one_more(plan, asked, device("d")).kv_tokens >= plan.kv_tokens
