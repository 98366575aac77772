"""Answers that keep to grammars where another machine samples: it is told the vocabulary, and may be lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from cluster.machines import WorkerProcess, WorkerThread, joined
from plain_settings import CACHE_DIR, make_settings
from steering import until

from core.cluster.master import Master
from core.grammars import forms
from core.inference_pipeline import InferencePipeline
from core.request import SamplingParams

SCHEMA = {"type": "array", "items": {"enum": ["card", "machine", 1, 22, None]}, "minItems": 6, "maxItems": 9}
KEPT = SamplingParams(max_tokens=120, temperature=1.0, seed=3, grammar=forms.compose(forms.json_schema(SCHEMA)))
FREE = SamplingParams(max_tokens=24, temperature=0.8, seed=11, ignore_eos=True)
LONG = replace(KEPT, max_tokens=400, grammar=forms.compose(forms.regex("([ab]{3}c?)*")), ignore_eos=True)


def tokens(pipeline: InferencePipeline, *params: SamplingParams) -> list[list[int]]:
    prompt = pipeline.model.tokenizer.encode("What is VRAM?")
    handles = [pipeline.submit(prompt, each) for each in params]
    return [list(handle.result().completions[0].token_ids) for handle in handles]


@pytest.fixture(scope="module")
def alone() -> Iterator[list[list[int]]]:
    """What one machine says."""
    pipeline = InferencePipeline(make_settings(devices__devices="cpu=256MiB", runtime__cache_dir=CACHE_DIR))
    try:
        pipeline.load()
        yield tokens(pipeline, KEPT, FREE, LONG)
    finally:
        pipeline.shutdown()


@pytest.mark.parametrize("devices", ["cpu=64MiB,desk/cpu", "desk/cpu,cpu=64MiB"])
def test_a_model_over_machines_keeps_to_the_same_grammar(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline], alone: list[list[int]],
    devices: str,
) -> None:  # fmt: skip
    add_worker("desk")
    pipeline = serve(model__name=None, devices__devices=devices, devices__layers="3,3")
    assert tokens(pipeline, KEPT, FREE, LONG) == alone


def test_a_worker_that_is_killed_takes_no_grammar_along(
    master: Master, serve: Callable[..., InferencePipeline], alone: list[list[int]]
) -> None:
    worker = WorkerProcess(master, CACHE_DIR, "desk", "cpu=64MiB")
    try:
        joined(master, 1)
        pipeline = serve(model__name=None, devices__devices="cpu=128MiB,desk/cpu", devices__layers="3,3")
        prompt = pipeline.model.tokenizer.encode("What is VRAM?")
        handles = [pipeline.submit(prompt, params) for params in (KEPT, FREE, LONG)]
        assert handles[2].get() is not None, "it has begun"
        worker.process.kill()
        rest = [list(handle.result().completions[0].token_ids) for handle in handles[:2]]
        (ended,) = handles[2].result().completions
        until(lambda: len(pipeline.engine.plan.placement.stages) == 1, "the survivor has all layers")
        assert rest == alone[:2]
        assert list(ended.token_ids) == alone[2][-len(ended.token_ids) :]
    finally:
        worker.close()
