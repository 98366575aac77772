"""KV that lives on other devices is attended where it is: tokens are those of `generate()`, whatever moves
meanwhile.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from lending_cases import OpenPipeline, open_tight, reclaim_something, remote_blocks, scatter
from steering import LONGEST_WAIT_S, arriving_together, between_steps
from tiny_models import VOCAB, build_tiny

from core.batching.output import RequestHandle
from core.inference_pipeline import InferencePipeline
from core.request import SamplingParams

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, detokenize=False)
LENGTHS = (5, 23, 40, 12, 31, 9)


def prompts() -> list[list[int]]:
    return [
        torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        for length in LENGTHS
    ]


def reference(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    with torch.inference_mode():
        ids = torch.tensor([prompt])
        out = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=GREEDY.max_tokens, do_sample=False
        )
    return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def ask(pipeline: InferencePipeline) -> list[RequestHandle]:
    with arriving_together(pipeline):
        return [pipeline.submit(prompt, GREEDY) for prompt in prompts()]


def answers(handles: list[RequestHandle]) -> list[list[int]]:
    return [handle.result(LONGEST_WAIT_S).completions[0].token_ids for handle in handles]


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "gpt_oss", "qwen3"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    path = tmp_path_factory.mktemp(request.param)
    model = build_tiny(request.param, path)
    return path, [reference(model, prompt) for prompt in prompts()]


@pytest.mark.parametrize("cohorts", [1, 2])
@pytest.mark.parametrize("own", [[64, 640], [640, 64]], ids=["first-tight", "last-tight"])
def test_a_tight_stage_borrows_and_tokens_stay_the_same(
    tiny: tuple[Path, list[list[int]]], open_pipeline: OpenPipeline, own: list[int], cohorts: int
) -> None:
    pipeline = open_tight(open_pipeline, tiny[0], own, engine__cohorts=cohorts)
    engine = pipeline.engine
    assert engine.kv.capacity_tokens > 64
    assert answers(ask(pipeline)) == tiny[1]
    assert engine.batcher.stats.preemptions == 0
    assert engine.memory.overflow is not None
    assert engine.memory.overflow.lending.stats().bytes_lent_total > 0
    engine.check_invariants()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("cohorts", [1, 2])
def test_any_share_of_blocks_may_be_anywhere_and_move_at_any_time(
    tiny: tuple[Path, list[list[int]]], open_pipeline: OpenPipeline, share: float, cohorts: int
) -> None:
    pipeline = open_tight(open_pipeline, tiny[0], [400, 1200], engine__cohorts=cohorts, lending__extent_blocks=16)
    engine, rng = pipeline.engine, random.Random(int(share * 10) + cohorts)
    away = []

    def stir() -> None:
        scatter(engine, rng, share)
        away.append(remote_blocks(engine))

    with between_steps(pipeline, stir):
        assert answers(ask(pipeline)) == tiny[1]
    assert max(away) > 0 if share > 0 else max(away) == 0
    assert answers(ask(pipeline)) == tiny[1], "prefixes are where they were left"


def test_reclaims_at_random_moments_cost_no_request_a_token(
    tiny: tuple[Path, list[list[int]]], open_pipeline: OpenPipeline
) -> None:
    pipeline = open_tight(open_pipeline, tiny[0], [64, 640], engine__cohorts=2)
    engine, rng = pipeline.engine, random.Random(5)

    def reclaim() -> None:
        reclaim_something(engine, rng)
        engine.batcher.scheduler.check_invariants()

    assert engine.memory.overflow is not None
    lending = engine.memory.overflow.lending
    with between_steps(pipeline, reclaim):
        for _ in range(40):  # how many steps a round takes is the machine's business
            assert answers(ask(pipeline)) == tiny[1]
            if sum(lending.stats().reclaims.values()) > 20:
                return
    pytest.fail(f"only {lending.stats().reclaims}")
