"""Memory that is lent and wanted back, and steps that fail with moves on board: requests go on, others are unharmed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lending_cases import OpenPipeline, open_tight, remote_blocks, scatter
from steering import LONGEST_WAIT_S, between_steps, with_each_step
from test_lending_serving import ask, prompts, reference
from tiny_models import build_tiny

from core.batching.output import RequestHandle
from core.engine.model_engine import ModelEngine
from core.errors import VRAMancerError
from core.execution.stage import Stage
from core.inference_pipeline import InferencePipeline
from core.kv_cache.paged_kv_cache import PagedKVCache


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    path = tmp_path_factory.mktemp("qwen3")
    model = build_tiny("qwen3", path)
    return path, [reference(model, prompt) for prompt in prompts()]


def check_budgets(engine: ModelEngine) -> None:
    """On the engine thread: nobody holds more than its device has, and the books agree."""
    engine.batcher.scheduler.check_invariants()
    for device in engine.plan.devices:
        used = engine.budgets[device.name].used_by_purpose()
        assert sum(used.values()) <= device.memory_limit_bytes
        leases = engine.memory.overflow.lending.leases(lender=device.name) if engine.memory.overflow else ()
        assert used.get(PagedKVCache.LENT, 0) == sum(lease.nbytes for lease in leases)


def outcomes(handles: list[RequestHandle]) -> list[list[int] | None]:
    """Tokens of each request; None for one that failed."""
    found: list[list[int] | None] = []
    for handle in handles:
        try:
            found.append(handle.result(LONGEST_WAIT_S).completions[0].token_ids)
        except VRAMancerError:
            found.append(None)
    return found


def outcomes_while(pipeline: InferencePipeline, act: Callable[[], object]) -> list[list[int] | None]:
    """Outcomes of all prompts, with `act` on the engine thread between their steps."""
    with between_steps(pipeline, act):
        return outcomes(ask(pipeline))


class Once:
    """Raises at the first call that `matters`, and does what the original does at others."""

    def __init__(self, original: Callable[..., Any], matters: Callable[..., bool]) -> None:
        self.original, self.matters, self.raised = original, matters, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.raised and self.matters(*args, **kwargs):
            self.raised = True
            raise RuntimeError("broken for a test")
        return self.original(*args, **kwargs)


@pytest.mark.parametrize("cohorts", [1, 2])
@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_that_fails_once_changes_nothing(
    tiny: tuple[Path, list[list[int]]], open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch, cohorts: int,
    stage: int,
) -> None:  # fmt: skip
    pipeline = open_tight(open_pipeline, tiny[0], [200, 640], engine__cohorts=cohorts, engine__max_batch_size=3)
    engine, rng = pipeline.engine, random.Random(3)
    broken, calls = engine.stages[stage], []

    def late(batch: Any, *args: Any) -> bool:
        calls.append(batch)
        return len(calls) == 12

    monkeypatch.setattr(broken, "forward", Once(broken.forward, late))
    assert outcomes_while(pipeline, lambda: scatter(engine, rng, 0.5)) == tiny[1]
    assert len(calls) >= 12
    assert outcomes(ask(pipeline)) == tiny[1], "prefixes that stayed are sound"


@pytest.mark.parametrize("cohorts", [1, 2])
def test_a_move_that_fails_has_everything_computed_again(
    tiny: tuple[Path, list[list[int]]], open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch, cohorts: int
) -> None:
    pipeline = open_tight(open_pipeline, tiny[0], [200, 640], engine__cohorts=cohorts)
    engine, rng = pipeline.engine, random.Random(3)
    assert isinstance(engine.stages[0], Stage)
    broken = Once(PagedKVCache.unpack, lambda *args: True)
    monkeypatch.setattr(PagedKVCache, "unpack", lambda *args: broken(*args))  # noqa: PLW0108  bound to its cache
    assert outcomes_while(pipeline, lambda: scatter(engine, rng, 0.5)) == tiny[1]
    assert broken.raised
    assert outcomes(ask(pipeline)) == tiny[1]
    assert remote_blocks(engine) >= 0


def test_raw_calls_fit_in_what_all_devices_hold_and_change_nothing(
    tiny: tuple[Path, list[list[int]]], open_pipeline: OpenPipeline
) -> None:
    """A prompt longer than the tight stage's own pages, beside requests whose blocks it pushes away."""
    roomy = open_pipeline(tiny[0], model__max_model_len=128)
    raw = list(range(3, 93))
    expected = roomy.infer(raw, output="logits", positions="all")
    pipeline = open_tight(open_pipeline, tiny[0], [64, 640])
    handles = ask(pipeline)
    assert torch.allclose(pipeline.infer(raw, output="logits", positions="all"), expected, atol=2e-4)
    assert outcomes(handles) == tiny[1]


def test_a_move_that_fails_with_a_raw_call_has_it_computed_again(
    tiny: tuple[Path, list[list[int]]], open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = list(range(3, 93))
    expected = open_pipeline(tiny[0], model__max_model_len=128).infer(raw, output="logits", positions="all")
    pipeline = open_tight(open_pipeline, tiny[0], [64, 640])
    engine, rng = pipeline.engine, random.Random(5)
    assert outcomes(ask(pipeline)) == tiny[1]
    broken = Once(PagedKVCache.unpack, lambda *args: True)
    monkeypatch.setattr(PagedKVCache, "unpack", lambda *args: broken(*args))  # noqa: PLW0108  bound to its cache
    with with_each_step(pipeline, lambda: scatter(engine, rng, 0.5)):
        found = pipeline.infer(raw, output="logits", positions="all")
    assert broken.raised
    assert torch.allclose(found, expected, atol=2e-4)
    assert outcomes(ask(pipeline)) == tiny[1]
