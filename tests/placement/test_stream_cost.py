"""The cost of layers that stream in, beside a simulation of two slots and one link."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.costs import Batch, LayerCosts, LinkProfile, LinkTopology, StageCost, StageTimer
from core.costs.cost import busy_s, decode_tok_s, load_s, loaded_layers, pipeline_s
from core.costs.profile import DeviceProfile
from core.devices import HOST
from core.placement.streamed_layers import spread

ONE = Batch.decode(1, 0)


def costs_of(number: int, nbytes: int = 100) -> LayerCosts:
    return LayerCosts(
        10, (nbytes,) * number, 0, 10, False, (0,) * number, layer_flops=(0,) * number, head_flops=0, hidden_bytes=1
    )


def passes(number: int, streamed: list[int], layer_s: float, transfer_s: float, idle_s: float) -> list[float]:
    """Seconds of each of some passes, `idle_s` apart, of a stage whose head takes as long as a tenth of a layer."""
    order, loaded = list(streamed), set(loaded_layers(streamed))
    arrives, link_free, now, spent = {}, 0.0, 0.0, []
    for turn in range(min(2, len(order))):
        link_free += transfer_s
        arrives[turn] = link_free
    for _ in range(30):
        now += idle_s
        began = now
        for layer in range(number):
            if layer in order:
                turn = order.index(layer)
                now = max(now, arrives[turn])
            now += layer_s
            if layer in loaded:
                following = turn + 2 if turn + 2 < len(order) else turn % 2
                link_free = max(link_free, now) + transfer_s
                arrives[following] = link_free
        now += layer_s / 10
        spent.append(now - began)
    return spent


@settings(max_examples=200)
@given(st.integers(4, 30), st.data())
def test_prediction_follows_the_simulation(number: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(3, number))
    transfer_s = data.draw(st.sampled_from((0.1, 0.5, 0.9, 1.5, 3.0, 20.0)))
    streamed = tuple(spread(range(number), count))
    costs, device = costs_of(number), DeviceProfile("d", 100.0, ((1, 1e9),))
    link = LinkProfile(100 / transfer_s)
    links = LinkTopology({(HOST, "d"): link})
    stage = StageCost(device, 0, number, streamed)
    rested = passes(number, list(streamed), 1.0, transfer_s, idle_s=3 * transfer_s)[-1]
    ((predicted,), _) = pipeline_s(costs, [stage], links, ONE)
    assert predicted == pytest.approx(rested, rel=0.35)
    assert StageTimer(costs, device, 0, number, streamed, link).seconds(ONE) == pytest.approx(predicted)
    busy = passes(number, list(streamed), 1.0, transfer_s, idle_s=0.0)
    mean = sum(busy[10:]) / len(busy[10:])
    assert busy_s(costs, stage, links, ONE) <= mean * 1.001, "no pass comes sooner than this"
    assert 1 / decode_tok_s(costs, [stage], links, 1, 0, 1) == pytest.approx(mean, rel=0.35)


def test_slow_links_bound_the_rate_and_fast_ones_cost_nothing() -> None:
    costs, device = costs_of(24), DeviceProfile("d", 100.0, ((1, 1e9),))
    streamed = tuple(spread(range(24), 12))
    stage, resident = StageCost(device, 0, 24, streamed), StageCost(device, 0, 24)
    slow, fast = (LinkTopology({(HOST, "d"): LinkProfile(bandwidth)}) for bandwidth in (10.0, 1e6))
    assert load_s(costs, stage, slow) == pytest.approx(120.0)
    assert decode_tok_s(costs, [stage], slow, 8, 0, 1) == pytest.approx(8 / 120.0)
    assert decode_tok_s(costs, [stage], fast, 8, 0, 1) == decode_tok_s(costs, [resident], fast, 8, 0, 1)


def test_each_batch_in_flight_loads_the_layers_again() -> None:
    costs, devices = costs_of(24), [DeviceProfile(name, 100.0, ((1, 1e9),)) for name in "ab"]
    links = LinkTopology({(HOST, name): LinkProfile(10.0) for name in "ab"})
    stages = [StageCost(devices[0], 0, 12, tuple(range(12))), StageCost(devices[1], 12, 24, tuple(range(12, 24)))]
    one, two = (decode_tok_s(costs, stages, links, 8, 0, cohorts) for cohorts in (1, 2))
    assert one == pytest.approx(8 / (2 * 10 * 10 + 4.1), rel=0.02), "the first two are there when a batch comes"
    assert two == pytest.approx(8 / 240.0)
