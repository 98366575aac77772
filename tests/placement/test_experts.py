"""Mixtures of experts: what a batch reads and computes, from the weights' shapes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from plain_settings import make_settings
from tiny_models import build_tiny

from core.costs import Batch, DeviceProfile, Experts, LayerCosts, StageCost, StageTimer
from core.costs.cost import stage_s
from core.engine.model_plan import layer_costs
from core.models.architecture import read_architecture
from core.models.stage_model import measure_bytes
from core.placement.predict import stage_limit

DENSE = LayerCosts(
    embedding_bytes=0, layer_bytes=(1000, 900, 900), after_bytes=0, head_bytes=0, tied=False,
    kv_bytes_per_token=(4, 4, 4), layer_flops=(2000, 500, 500), head_flops=0, hidden_bytes=8,
)  # fmt: skip
MIXED = replace(DENSE, experts=Experts((0, 800, 800), (0, 8, 8), 2))
DEVICE = DeviceProfile("card", 1e6, ((1, 1e9),), 1e-5, 1e-4)


@pytest.mark.parametrize(
    ("number", "per_token", "tokens", "distinct"),
    [
        (8, 2, 1, 2.0),
        (8, 2, 2, 3.5),  # the second token finds 2 of its experts among 8, of which 2 are read: 2 * 6 / 8 new ones
        (8, 2, 32, 8 * (1 - 0.75**32)),
        (128, 8, 1, 8.0),
        (128, 8, 32, 128 * (1 - (15 / 16) ** 32)),
        (4, 4, 1, 4.0),
        (4, 4, 100, 4.0),
    ],
)
def test_as_many_different_experts_are_read_as_are_expected(
    number: int, per_token: int, tokens: int, distinct: float
) -> None:
    expert_bytes = 100
    experts = Experts((number * expert_bytes,), (number,), per_token)
    assert number * expert_bytes - experts.unread_bytes(0, tokens) == pytest.approx(distinct * expert_bytes)


def test_only_bytes_of_experts_depend_on_the_batch() -> None:
    assert [MIXED.read_bytes(0, tokens) for tokens in (1, 100)] == [1000, 1000]
    assert MIXED.read_bytes(1, 1) == 100 + 200
    assert MIXED.read_bytes(1, 1000) == pytest.approx(900)
    assert MIXED.weight_bytes(0, 3) == DENSE.weight_bytes(0, 3), "all of them are kept in memory"


def test_a_stage_is_faster_by_the_experts_that_are_not_read() -> None:
    for tokens in (1, 4, 64):
        batch = Batch.decode(tokens, 10)
        unread = 2 * 800 * 0.75**tokens
        saved = stage_s(DENSE, DEVICE, 0, 3, batch) - stage_s(MIXED, DEVICE, 0, 3, batch)
        assert saved == pytest.approx(unread / DEVICE.bandwidth_bytes_s)


@pytest.mark.parametrize("costs", [DENSE, MIXED], ids=["dense", "experts"])
def test_a_timer_says_what_the_cost_model_says(costs: LayerCosts) -> None:
    for first, last in ((0, 3), (1, 3), (0, 1), (1, 2)):
        timer = StageTimer(costs, DEVICE, first, last)
        for batch in (Batch.decode(1, 7), Batch.decode(9, 70), Batch(300, 4000, 2)):
            assert timer.seconds(batch) == pytest.approx(stage_s(costs, DEVICE, first, last, batch))


def test_what_limits_a_stage_follows_from_what_is_read() -> None:
    slow = DeviceProfile("slow", 1e6, ((1, 2.5e6),))
    stage = StageCost(slow, 1, 3)
    costs = replace(MIXED, layer_flops=(2000, 1800, 1800))
    assert stage_limit(replace(costs, experts=None), stage, Batch.decode(1, 1)) == "bandwidth"
    assert stage_limit(costs, stage, Batch.decode(1, 1)) == "compute"


HIDDEN, EXPERT = 32, 24


@pytest.mark.parametrize(
    ("name", "expert_numbers", "without"),
    [
        # gate, up and down of each expert; mixtral's experts are as wide as `intermediate_size`
        ("mixtral", 3 * HIDDEN * 48, 0),
        ("qwen3_moe", 3 * HIDDEN * EXPERT, 0),
        # gate and up in one, with a bias each; so has down
        ("gpt_oss", 3 * HIDDEN * 48 + 2 * 48 + HIDDEN, 0),
        ("deepseek_v3", 3 * HIDDEN * EXPERT, 1),
        ("llama", 0, 4),
    ],
)
def test_experts_are_counted_by_the_shapes_of_their_weights(
    tmp_path: Path, name: str, expert_numbers: int, without: int
) -> None:
    build_tiny(name, tmp_path)
    architecture = read_architecture(tmp_path)
    weights = measure_bytes(architecture)
    costs = layer_costs(architecture, weights, make_settings())
    for layer in range(4):
        routed = 4 * 4 * expert_numbers if layer >= without else 0  # four of them, four bytes a number
        assert costs.read_bytes(layer, 1) == costs.layer_bytes[layer] - routed / 2, "two of the four"
        assert costs.read_bytes(layer, 2) == costs.layer_bytes[layer] - routed / 4
        assert costs.layer_flops[layer] == 2 * costs.read_bytes(layer, 1) / 4
