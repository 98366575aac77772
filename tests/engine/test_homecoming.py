"""Blocks that had to leave come back when there is room, stay, or are computed again: by the links' speed."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from pathlib import Path

import pytest
from lending_cases import OpenPipeline, open_tight, remote_blocks, tight_devices
from steering import LONGEST_WAIT_S, arriving_together, between_steps
from test_lending_serving import GREEDY, prompts
from tiny_models import build_tiny

from core.batching.running import RunningSequences
from core.inference_pipeline import InferencePipeline
from core.lending import Choice

LONG = replace(GREEDY, max_tokens=80)
SPEED = "@40MB/s/1GFLOPS"


@pytest.fixture(autouse=True)
def same_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decisions weigh what prompts and steps take by the clock against the emulated links: here prompts always take the
    same, and steps do in `outgrow`."""
    monkeypatch.setattr(RunningSequences, "prefill_token_s", 1e-3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    build_tiny("qwen3", path)
    return path


def open_linked(open_pipeline: OpenPipeline, model: Path, link: str) -> InferencePipeline:
    """The first stage has room for 128 tokens, the second for plenty."""
    return open_tight(
        open_pipeline, model, [128, 1024], devices__devices=tight_devices(model, "2,2", [128, 1024], "sim", SPEED),
        devices__sim_link=link, engine__cohorts=1, engine__enable_prefix_caching=False,
    )  # fmt: skip


def outgrow(pipeline: InferencePipeline) -> tuple[list[int], int, dict[Choice, int]]:
    """A request whose blocks leave because others fill the stage, and which goes on when these have ended.

    Returns its tokens, how many of its blocks were still away near its end, and what was decided meanwhile.
    """
    engine = pipeline.engine
    assert engine.memory.overflow is not None and engine.memory.overflow.homecoming is not None
    engine.memory.overflow._clock = itertools.count(time.monotonic(), 0.02).__next__
    seen: list[tuple[int, int]] = []
    with between_steps(pipeline, lambda: seen.append((engine.batcher.scheduler.num_running, remote_blocks(engine)))):
        with arriving_together(pipeline):
            others = [pipeline.submit(prompts()[2] + prompts()[4], GREEDY) for _ in range(2)]
            last = pipeline.submit(prompts()[3], LONG)
        tokens = last.result(LONGEST_WAIT_S).completions[0].token_ids
    assert all(handle.finished for handle in others)
    assert max(away for running, away in seen if running == 3)
    alone = [away for running, away in seen if running == 1]
    return tokens, alone[-1], engine.memory.overflow.homecoming.decisions


@pytest.fixture
def expected(tiny: Path, open_pipeline: OpenPipeline) -> list[int]:
    pipeline = open_pipeline(tiny, model__max_model_len=128)
    return pipeline.submit(prompts()[3], LONG).result(LONGEST_WAIT_S).completions[0].token_ids


def test_over_a_fast_link_they_come_home(tiny: Path, open_pipeline: OpenPipeline, expected: list[int]) -> None:
    tokens, left, decisions = outgrow(open_linked(open_pipeline, tiny, "100MB/s@2ms"))
    assert tokens == expected
    assert left == 0
    assert decisions[Choice.FETCH] > 0


def test_where_attending_costs_nothing_they_stay(tiny: Path, open_pipeline: OpenPipeline, expected: list[int]) -> None:
    tokens, left, decisions = outgrow(open_linked(open_pipeline, tiny, "100GB/s@0us"))
    assert tokens == expected
    assert left > 0
    assert decisions[Choice.FETCH] == decisions[Choice.RECOMPUTE] == 0


def test_over_a_slow_link_they_are_computed_again(tiny: Path, open_pipeline: OpenPipeline, expected: list[int]) -> None:
    pipeline = open_linked(open_pipeline, tiny, "0.1MB/s@5ms")
    tokens, left, decisions = outgrow(pipeline)
    assert tokens == expected
    assert left == 0
    assert decisions[Choice.RECOMPUTE] > 0
    assert pipeline.engine.batcher.stats.preemptions > 0
