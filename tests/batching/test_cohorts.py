"""How many steps are put in flight, and how long chunks of prompts are."""

from __future__ import annotations

from core.batching.cohorts import MIN_CHUNK, STALL, FixedCohorts, OneCohort, PredictedCohorts
from core.costs import Batch, DeviceProfile, LayerCosts, LinkProfile, LinkTopology, StageCost
from core.costs.cost import decode_tok_s, load_s, stage_s
from core.devices import HOST

GB = 10**9
COSTS = LayerCosts(
    embedding_bytes=0, layer_bytes=(GB,) * 8, after_bytes=0, head_bytes=0, tied=False,
    kv_bytes_per_token=(100_000,) * 8, layer_flops=(GB,) * 8, head_flops=0, hidden_bytes=8192,
)  # fmt: skip
CARD = DeviceProfile("card", 900 * GB, ((1, 70e12),))
STAGES = (StageCost(CARD, 0, 4), StageCost(CARD, 4, 8))
POLICY = PredictedCohorts(COSTS, STAGES, LinkTopology(), max_chunk=2048)
STREAMING = tuple(StageCost(CARD, stage.first, stage.last, tuple(range(stage.first, stage.last))) for stage in STAGES)
PCIE = LinkTopology({(HOST, "card"): LinkProfile(12.0 * GB)})


def test_a_single_stage_runs_one_step_at_a_time() -> None:
    assert OneCohort(512).choose(100, 100, 3000).cohorts == 1


def test_one_stream_is_one_step() -> None:
    assert POLICY.choose(1, 1000, 0).cohorts == 1
    assert FixedCohorts(3, 3, 512).choose(1, 1000, 0).cohorts == 1


def test_without_knowledge_there_is_a_step_for_every_stage() -> None:
    assert FixedCohorts(3, 3, 512).choose(20, 1000, 0).cohorts == 3
    assert FixedCohorts(3, 3, 512).choose(2, 1000, 0).cohorts == 2


def test_without_knowledge_each_piece_of_a_prompt_is_a_step() -> None:
    fixed = FixedCohorts(3, 3, 512)
    assert fixed.choose(0, 0, 4000).cohorts == 3, "eight pieces"
    assert fixed.choose(0, 0, 2 * MIN_CHUNK).cohorts == 2
    assert fixed.choose(1, 1000, 1).cohorts == 2, "one that decodes, and one piece"
    assert fixed.choose(0, 0, 0).cohorts == 1


def test_while_weights_are_the_cost_more_cohorts_bring_nothing() -> None:
    few = [decode_tok_s(COSTS, STAGES, LinkTopology(), 4, 10, count) for count in (1, 2, 4)]
    assert few[1] < 1.05 * few[0]
    assert few[2] < few[0], "four cohorts read the weights four times"
    assert POLICY.choose(4, 10, 0).cohorts == 1


def test_where_the_kv_is_the_cost_both_stages_work() -> None:
    choice = POLICY.choose(32, 8000, 0)
    one, chosen = (decode_tok_s(COSTS, STAGES, LinkTopology(), 32, 8192, count) for count in (1, choice.cohorts))
    assert choice.cohorts >= 2
    assert chosen > 1.8 * one


def test_a_prompt_alone_is_cut_so_that_its_chunks_overlap() -> None:
    choice = POLICY.choose(0, 0, 4000)
    assert choice.cohorts == 2
    assert 4000 / choice.chunk >= 4
    short = POLICY.choose(0, 0, 20)
    assert short.chunk >= MIN_CHUNK


def test_a_prompt_beside_decodes_holds_them_up_by_a_bounded_time() -> None:
    choice = POLICY.choose(8, 1000, 100_000)
    alone = stage_s(COSTS, CARD, 0, 4, Batch.decode(8, 1024))
    with_chunk = stage_s(COSTS, CARD, 0, 4, Batch(8 + choice.chunk, 8 * 1024 + choice.chunk, 8))
    assert MIN_CHUNK <= choice.chunk < 2048
    assert with_chunk <= 3 * alone
    longer = stage_s(COSTS, CARD, 0, 4, Batch(8 + 2 * choice.chunk, 8 * 1024 + 2 * choice.chunk, 8))
    assert longer > STALL * alone, "as long as the bound allows"
    many = POLICY.choose(512, 4000, 100_000)
    assert many.chunk > choice.chunk, "where decoding takes long, so may a chunk"


def test_where_layers_stream_in_a_prompt_is_not_cut_below_what_loading_hides() -> None:
    policy = PredictedCohorts(COSTS, STREAMING, PCIE, max_chunk=1 << 20)
    loading_s = load_s(COSTS, STREAMING[0], PCIE)
    choice = policy.choose(0, 0, 4000)
    assert (choice.cohorts, choice.chunk >= 4000) == (1, True), "each step would load everything again"
    long = policy.choose(0, 0, 16_000)
    assert long.cohorts == 2
    assert stage_s(COSTS, CARD, 0, 4, Batch(long.chunk, long.chunk, 1)) <= loading_s
    assert stage_s(COSTS, CARD, 0, 4, Batch(2 * long.chunk, 2 * long.chunk, 1)) > loading_s
    beside = policy.choose(8, 1000, 4000)
    assert beside.cohorts == policy.choose(8, 1000, 0).cohorts == 1, "prompts share the step of those that decode"
    assert PredictedCohorts(COSTS, STREAMING, PCIE, max_chunk=512).choose(0, 0, 4000).chunk == 512
