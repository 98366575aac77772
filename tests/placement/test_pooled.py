"""Plans whose stages borrow memory for KV: taken where they are faster and hold as much."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import STAGED, large

from core.costs import PlacementDevice, PlacementProblem
from core.costs.cards import gpu_spec
from core.costs.plan import LayerCosts
from core.costs.profile import DeviceProfile, LinkProfile, LinkTopology
from core.errors import InsufficientMemoryError
from core.placement.engine import place, predicted_tok_s
from core.placement.pooled import place_pooled, pool_of, pooled_tok_s
from core.placement.predict import predict

GiB = 1 << 30
LLAMA_13B = large(40, 5120, 13824, 5120, vocab=32_000)
"""24 GiB of weights, 800 KiB of KV per token: eight streams of 2,048 tokens take 12.5 GiB."""


FAST, SLOW = "48GiB@1800GB/s/400TFLOPS", "24GiB@180GB/s/20TFLOPS"


def request(*gpus: str, wanted: int = 32_768) -> PlacementProblem:
    return PlacementProblem(
        "model", LLAMA_13B, gpu_spec(*gpus), STAGED, objective="throughput", streams=8, context=2048,
        min_kv_tokens=256, max_kv_tokens=wanted,
    )  # fmt: skip


def test_a_slow_card_serves_as_memory_alone() -> None:
    """One card holds all the weights and the KV that the streams usually need. To hold all that could be used without
    lending, some layers would have to be on a card of a tenth of its speed, and every step would wait for that one."""
    asked = request(FAST, SLOW)
    alone = place(asked)
    assert len(alone.stages) == 2, "to have room for KV"
    plan = place_pooled(asked, "profiled", 0.7)
    assert [stage.num_layers for stage in plan.stages] == [40]
    pooled = pool_of(asked, plan, 0.7)
    assert pooled.tokens >= 0.95 * alone.kv_tokens
    assert pooled.local_tokens[0] < pooled.tokens
    assert pooled_tok_s(asked, plan, pooled) > 1.03 * predicted_tok_s(alone, asked)


def test_the_prediction_counts_what_is_borrowed() -> None:
    asked = request(FAST, SLOW)
    plan = place_pooled(asked, "profiled", 0.7)
    pooled = pool_of(asked, plan, 0.7)
    assert 8 * 2048 < pooled.local_tokens[0] < 16 * 2048
    for links, slower in ((STAGED, False), (LinkTopology(default=LinkProfile(1e9, 5e-3)), True)):
        linked = replace(asked, links=links)
        few, many = predict(plan, linked, (8, 16), pooled=pooled).rates
        plain, unaware = predict(plan, linked, (8, 16)).rates
        assert few == plain and few.borrowing_s == 0.0, "what eight streams need is at home"
        assert (many.borrowing_s > 0) == slower, "a quick lender reads beside the stage's own device"
        assert many.tok_s == pytest.approx(pooled_tok_s(replace(linked, streams=16), plan, pooled))
        assert many.token_s == pytest.approx(unaware.token_s + many.borrowing_s)


@pytest.mark.parametrize(
    ("cards", "layers", "streams", "context"),
    [(["3090"] * 3, (20, 20), 32, 2048), (["3090"] * 3 + ["a100"], (14, 13, 13), 64, 2048),
     (["3090", "3090", "a100"], (20, 20), 64, 1024), (["3090"] * 4, (10, 10, 20), 128, 512),
     (["3090", "3090", "48GiB@100GB/s/20TFLOPS"], (20, 20), 64, 1024)],
)  # fmt: skip
def test_borrowing_does_not_make_time_for_what_stages_do_at_once(
    cards: list[str], layers: tuple[int, ...], streams: int, context: int
) -> None:
    """Several stages borrow from one device that has no layers."""
    asked = replace(
        request(*cards, wanted=streams * context), layers=layers, streams=streams, context=context, min_kv_tokens=16
    )
    plan = place(asked)
    pooled = pool_of(asked, plan, 0.9)
    assert any(local < min(pooled.tokens, streams * context) for local in pooled.local_tokens)
    (rate,) = predict(plan, asked, (streams,), pooled=pooled).rates
    assert 0 < rate.roofline_share <= 1
    read = min(streams * context, pooled.tokens)
    away = sum(
        (read - local) * stage.kv_bytes_per_token for local, stage in zip(pooled.local_tokens, plan.stages, strict=True)
    )
    lender = max(device.profile.bandwidth_bytes_s for device in asked.devices if device.name in plan.unused_devices)
    least_s = (1 - 1e-9) * away / lender
    assert streams / rate.tok_s >= least_s, "the lender reads for all of them, one after the other"


def test_a_lender_with_a_stage_has_both_to_do() -> None:
    asked = replace(
        request("24GiB@936GB/s/71TFLOPS", "48GiB@300GB/s/40TFLOPS", wanted=32 * 1024), layers=(28, 12),
        streams=32, context=1024, min_kv_tokens=16,
    )  # fmt: skip
    plan = place(asked)
    pooled = pool_of(asked, plan, 0.9)
    (tight, roomy), local = plan.stages, pooled.local_tokens
    assert local[0] < pooled.tokens == local[1] == 32 * 1024
    (rate,) = predict(plan, asked, (32,), pooled=pooled).rates
    weights = roomy.num_layers * LLAMA_13B.layer_bytes[0]
    kv = pooled.tokens * roomy.kv_bytes_per_token + (pooled.tokens - local[0]) * tight.kv_bytes_per_token
    assert 32 / rate.tok_s >= (weights + kv) / 300e9


def test_without_lending_it_holds_what_it_needs_itself() -> None:
    asked = request(FAST, SLOW)
    assert place_pooled(asked, "profiled", 0.0) == place(asked)


def test_what_the_streams_need_is_borrowed_only_where_that_is_faster() -> None:
    """With 36 GiB the fast card lacks room for some of it: what moves, layers or KV, is read as slowly."""
    asked = request("36GiB@1800GB/s/400TFLOPS", SLOW, wanted=8 * 2048)
    slow = replace(asked, links=LinkTopology(default=LinkProfile(1e9, 5e-3)))
    assert place_pooled(slow, "profiled", 0.7) == place(slow)


@pytest.mark.parametrize("strategy", ["vram", "balanced"])
def test_other_strategies_are_what_they_are(strategy: str) -> None:
    asked = request("3090*2", "5070 Ti")
    assert place_pooled(asked, strategy, 0.7) == place(asked, strategy)


def test_layers_by_hand_stay() -> None:
    asked = replace(request("3090*2", "5070 Ti"), layers=(20, 15, 5))
    assert place_pooled(asked, "profiled", 0.7) == place(asked)


def test_a_plan_that_borrows_holds_the_longest_prompt_if_the_other_one_does() -> None:
    costs = LayerCosts(50, (100,) * 8, 5, 50, False, (2,) * 8, 10, 20, (200,) * 8, 100, hidden_bytes=16)
    found = 0
    for limit in range(1200, 9000, 60):
        asked = PlacementProblem(
            "model", costs,
            tuple(
                PlacementDevice(name, size, DeviceProfile(name, bandwidth, ((1, flops),)))
                for name, size, bandwidth, flops in (("a", limit, 962, 8386), ("b", 6143, 164, 9238))
            ),
            LinkTopology(default=LinkProfile(1e6)),
            objective="throughput", streams=4, context=32, min_kv_tokens=16, max_kv_tokens=512,
        )  # fmt: skip
        try:
            before = pool_of(asked, place(asked), 0.7).tokens
        except InsufficientMemoryError:
            continue
        found += pool_of(asked, place_pooled(asked, "profiled", 0.7), 0.7).tokens < before
        assert pool_of(asked, place_pooled(asked, "profiled", 0.7, 512), 0.7).tokens >= before
    assert found, "without the least, some hold a little less"


devices = st.lists(
    st.tuples(st.integers(20, 3000), st.floats(10, 1000), st.floats(100, 20_000)), min_size=2, max_size=4
)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(devices, st.integers(1, 8), st.floats(0, 1e-2), st.floats(10, 1000), st.floats(0.1, 1))
def test_it_is_never_slower_by_prediction_and_holds_as_much(
    cards: list[tuple[int, float, float]], streams: int, latency_s: float, link: float, ratio: float
) -> None:
    costs = LayerCosts(50, (100,) * 8, 5, 50, False, (2,) * 8, 10, 20, (200,) * 8, 100, hidden_bytes=16)
    asked = PlacementProblem(
        "model",
        costs,
        tuple(
            PlacementDevice(f"gpu{i}", limit, DeviceProfile(f"gpu{i}", bandwidth, ((1, flops),)))
            for i, (limit, bandwidth, flops) in enumerate(cards)
        ),
        LinkTopology(default=LinkProfile(link, latency_s)),
        objective="throughput", streams=streams, context=32, min_kv_tokens=16, max_kv_tokens=16 * 32,
    )  # fmt: skip
    try:
        alone = place(asked)
    except InsufficientMemoryError:
        return
    plan = place_pooled(asked, "profiled", ratio)
    held, before = pool_of(asked, plan, ratio), pool_of(asked, alone, ratio)
    assert held.tokens >= 0.95 * before.tokens
    assert pooled_tok_s(asked, plan, held) >= pooled_tok_s(asked, alone, before)
    assert all(stage.free_bytes >= 0 for stage in plan.stages)
