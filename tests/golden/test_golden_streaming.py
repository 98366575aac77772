"""Golden: models twice as large as their devices stream layers in and give `generate()`'s greedy tokens.

The emulated link is slow beside the tiny layers' computing, so every pass has to wait for layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from steering import LONGEST_WAIT_S, arriving_together
from streamed_models import CHANGES, ENGINE, build_deep, half_of_it, weight_bytes
from tiny_models import VOCAB

from core.inference_pipeline import InferencePipeline
from core.request import SamplingParams

NEW_TOKENS = 6
LENGTHS = (3, 9, 1, 21)
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, detokenize=False)
OpenPipeline = Callable[..., InferencePipeline]


@dataclass
class Reference:
    path: Path
    prompts: list[list[int]]
    tokens: list[list[int]]


@pytest.fixture(scope="module", params=sorted(CHANGES))
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A checkpoint, prompts, and what transformers' own `generate()` makes of them, one at a time."""
    path = tmp_path_factory.mktemp(request.param)
    model = build_deep(request.param, path)
    prompts, tokens = [], []
    for length in LENGTHS:
        prompt = torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(length))
        with torch.inference_mode():
            out = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False
            )
        prompts.append(prompt[0].tolist())
        tokens.append(out[0, length:].tolist())
    return Reference(path, prompts, tokens)


@pytest.mark.parametrize(
    ("stages", "native"), [(1, True), (2, True), (2, False), (3, True)], ids=["1", "2", "2-torch", "3"]
)
def test_twice_the_devices_memory(reference: Reference, stages: int, native: bool, open_pipeline: OpenPipeline) -> None:
    """Alone, beside each other in several cohorts, from the prefix cache, beside streams that are given up."""
    pipeline = open_pipeline(
        reference.path, devices__devices=half_of_it(reference.path, stages, "sim", "@100GB/s/10TFLOPS"),
        devices__sim_link="1GB/s@20us", engine__native_kernels=native, engine__cohorts=stages,
        **{**ENGINE, "engine__max_num_batched_tokens": 16 if stages < 3 else 8},
    )  # fmt: skip
    engine = pipeline.engine
    assert len(engine.stages) == stages
    limits = sum(device.memory_limit_bytes for device in engine.plan.devices)
    assert weight_bytes(reference.path) >= 2 * limits
    assert all(stage.stream is not None for stage in engine.stages)

    for prompt, expected in zip(reference.prompts, reference.tokens, strict=True):
        assert pipeline.submit(prompt, GREEDY).result(LONGEST_WAIT_S).completions[0].token_ids == expected
    hits = engine.batcher.stats.hit_tokens
    with arriving_together(pipeline):
        given_up = [pipeline.submit([7, 8, 9], replace(GREEDY, max_tokens=60)) for _ in range(2)]
        handles = [pipeline.submit(prompt, GREEDY) for prompt in reference.prompts]
    for handle in given_up:
        handle.get(60)
        handle.abort()
    assert [handle.result(LONGEST_WAIT_S).completions[0].token_ids for handle in handles] == reference.tokens
    assert engine.batcher.stats.hit_tokens > hits, "the second round must have hit the prefix cache"
    for budget in engine.budgets.values():
        budget.check_invariants()
    assert all(stage.stream is not None and stage.stream.wait_s > 0 for stage in engine.stages)
