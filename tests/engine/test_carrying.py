"""KV that a model takes along when it moves: what is not computed again, and what is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from steering import LONGEST_WAIT_S, until
from tiny_models import VOCAB, build_tiny

from core.batching.output import RequestHandle
from core.engine import carrying
from core.execution.model_runner import ModelRunner
from core.execution.records import SchedulerOutput
from core.inference_pipeline import InferencePipeline
from core.kv_cache.paged_kv_cache import PagedKVCache
from core.request import GenerationResult, SamplingParams

OpenPipeline = Callable[..., InferencePipeline]
BLOCK, LENGTH, TOKENS = 4, 203, 60
PROMPTS = [[3 + (seed * 31 + at * 7 + at * at) % (VOCAB - 3) for at in range(LENGTH)] for seed in range(3)]
GREEDY = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=TOKENS, temperature=0.9, seed=7, ignore_eos=True)
ONE, TWO, THREE = ("cpu=48MiB", None), ("cpu=48MiB,cpu=48MiB", "3,1"), ("cpu=48MiB,cpu=48MiB,cpu=48MiB", "1,2,1")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sliding windows, heads of their own width."""
    path = tmp_path_factory.mktemp("gemma3")
    build_tiny("gemma3_text", path)
    return path


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each step."""
    found: list[int] = []
    begin = ModelRunner._begin

    def counted(self: ModelRunner, output: SchedulerOutput) -> None:
        found.append(sum(item.end - item.start for item in output.sequences))
        begin(self, output)

    monkeypatch.setattr(ModelRunner, "_begin", counted)
    return found


def open_on(
    open_pipeline: OpenPipeline, model: Path, place: tuple[str, str | None], **settings: Any
) -> InferencePipeline:
    defaults = {
        "devices__devices": place[0], "devices__layers": place[1], "engine__block_size": BLOCK,
        "engine__kv_cache_tokens": 4096, "engine__cohorts": 1,
    }  # fmt: skip
    return open_pipeline(model, **defaults | settings)


def submit(pipeline: InferencePipeline) -> list[RequestHandle]:
    return [pipeline.submit(prompt, params) for prompt, params in zip(PROMPTS, (GREEDY, SEEDED, GREEDY), strict=True)]


def results(handles: list[RequestHandle]) -> list[GenerationResult]:
    return [handle.result(LONGEST_WAIT_S) for handle in handles]


def answers(handles: list[RequestHandle]) -> list[list[int]]:
    return [list(result.completions[0].token_ids) for result in results(handles)]


def run_on(pipeline: InferencePipeline) -> list[RequestHandle]:
    """Requests that have all begun to answer."""
    handles = submit(pipeline)
    stats = pipeline.engine.batcher
    until(lambda: stats.stats.total_tokens >= 6 and stats.scheduler.num_decoding == len(handles), "answers")
    return handles


@pytest.mark.parametrize(("old", "new"), [(ONE, THREE), (THREE, TWO), (TWO, ONE), (TWO, TWO)])
def test_what_full_blocks_have_is_not_computed_again(
    gemma: Path, open_pipeline: OpenPipeline, computed: list[int], old: tuple[str, str | None],
    new: tuple[str, str | None],
) -> None:  # fmt: skip
    expected = answers(submit(open_on(open_pipeline, gemma, ONE)))
    pipeline = open_on(open_pipeline, gemma, old)
    handles = run_on(pipeline)
    computed.clear()
    moved = pipeline.place(devices=new[0], layers=new[1])
    found = results(handles)
    assert [list(each.completions[0].token_ids) for each in found] == expected
    assert (moved.carried_kv_tokens or 0) >= len(PROMPTS) * (LENGTH // BLOCK) * BLOCK
    assert sum(computed) < len(PROMPTS) * (TOKENS + 2 * BLOCK) < LENGTH * len(PROMPTS)
    assert [each.num_cached_tokens for each in found] == [0] * len(PROMPTS), "nothing was there when they came"


def test_prompts_of_before_are_found_where_the_model_has_moved(
    gemma: Path, open_pipeline: OpenPipeline, computed: list[int]
) -> None:
    pipeline = open_on(open_pipeline, gemma, ONE)
    expected = answers(submit(pipeline))
    pipeline.place(devices=TWO[0], layers=TWO[1])
    computed.clear()
    found = results(submit(pipeline))
    assert [list(each.completions[0].token_ids) for each in found] == expected
    assert all(each.num_cached_tokens > LENGTH - 2 * BLOCK for each in found)
    assert sum(computed) < LENGTH


def test_as_much_as_there_is_room_for(gemma: Path, open_pipeline: OpenPipeline) -> None:
    pipeline = open_on(open_pipeline, gemma, ONE)
    expected = answers(submit(pipeline))
    settings = pipeline.engine.settings
    smaller = settings.engine.model_copy(update={"kv_cache_tokens": 300})
    pipeline.engine.settings = settings.model_copy(update={"engine": smaller})
    moved = pipeline.place(devices=TWO[0], layers=TWO[1])
    assert moved.kv_tokens == 300 and moved.carried_kv_tokens == 300
    assert [
        answers([pipeline.submit(prompt, params)])
        for prompt, params in zip(PROMPTS, (GREEDY, SEEDED, GREEDY), strict=True)
    ] == [[each] for each in expected]


def test_what_cannot_be_taken_along_is_computed_again(
    gemma: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers(submit(open_on(open_pipeline, gemma, ONE)))
    pipeline = open_on(open_pipeline, gemma, ONE)
    handles = run_on(pipeline)
    unpack, calls = PagedKVCache.unpack, []

    def broken(self: PagedKVCache, *given: Any) -> None:
        calls.append(given)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        unpack(self, *given)

    monkeypatch.setattr(PagedKVCache, "unpack", broken)
    moved = pipeline.place(devices=TWO[0], layers=TWO[1])
    assert len(calls) == 2 and moved.carried_kv_tokens == 0
    assert answers(handles) == expected


def test_a_network_that_is_slower_than_computing_carries_nothing(gemma: Path, open_pipeline: OpenPipeline) -> None:
    pipeline = open_on(open_pipeline, gemma, TWO)
    engine = pipeline.engine
    here = carrying.Carrier(engine, engine, 1e-9)
    assert here._is_quicker(10), "no network lies between"
    ways = carrying.ways_between(engine.stages, engine.stages)
    assert [(way.at, way.to, way.layers) for way in ways] == [(0, 0, (0, 1, 2)), (1, 1, (3,))]


def test_pages_of_some_layers_are_what_all_of_them_are_cut_to(gemma: Path, open_pipeline: OpenPipeline) -> None:
    kv = open_on(open_pipeline, gemma, ONE).engine.stages[0].kv
    assert isinstance(kv, PagedKVCache)
    for pages in kv.region(0).layers.values():
        for tensor in pages:
            tensor.copy_(torch.randn_like(tensor))
    layers = list(kv.layer_bytes)
    first = sum(kv.layer_bytes[layer] for layer in layers[:1])
    last = first + sum(kv.layer_bytes[layer] for layer in layers[1:3])
    assert torch.equal(kv.pack(0, [5, 3], layers[1:3]), kv.pack(0, [5, 3])[:, first:last])
