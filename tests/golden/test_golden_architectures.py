"""Golden: every architecture, over 1, 2 and 3 stages, however requests arrive, gives `generate()`'s greedy tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
import torch
from steering import LONGEST_WAIT_S, arriving_together, until, with_each_step
from tiny_models import LAYERS, TINY, VOCAB, build_tiny
from transformers import PreTrainedModel

from core.batching.output import RequestHandle
from core.inference_pipeline import InferencePipeline
from core.request import GenerationResult, SamplingParams

NEW_TOKENS = 10
BLOCK = 4
LENGTHS = (3, 9, 14, 1, 8)
DEVICES = {1: "cpu=64MiB", 2: "cpu=64MiB,cpu=64MiB", 3: "cpu=64MiB,cpu=64MiB,cpu=64MiB"}
LOGPROB_TOLERANCE = 2e-4  # fp32 noise of two orders of summation

GREEDY = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, detokenize=False, logprobs=0)


@dataclass
class Reference:
    path: Path
    prompts: list[list[int]]
    tokens: list[list[int]]
    logprobs: list[list[float]]


@pytest.fixture(scope="module", params=sorted(TINY))
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(request.param, tmp_path_factory.mktemp(request.param))


def make_reference(name: str, path: Path) -> Reference:
    """A tiny checkpoint, prompts, and what transformers' own `generate()` makes of them, one at a time."""
    return reference_of(build_tiny(name, path), path)


def reference_of(model: PreTrainedModel, path: Path) -> Reference:
    """What a model's `generate()` makes of the prompts; `path` is what it is compared with."""
    prompts, tokens, logprobs = [], [], []
    for length in LENGTHS:
        generator = torch.Generator().manual_seed(length)
        prompt = torch.randint(3, VOCAB, (1, length), generator=generator)
        with torch.inference_mode():
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        chosen = out.sequences[0, length:].tolist()
        rows = torch.stack([row[0] for row in out.logits]).log_softmax(dim=-1)
        prompts.append(prompt[0].tolist())
        tokens.append(chosen)
        logprobs.append([rows[i, token].item() for i, token in enumerate(chosen)])
    return Reference(path, prompts, tokens, logprobs)


def check(reference: Reference, results: list[GenerationResult]) -> None:
    for index, result in enumerate(results):
        for completion in result.completions:
            assert completion.token_ids == reference.tokens[index]
            for got, expected in zip(completion.logprobs, reference.logprobs[index], strict=True):
                assert got.logprob == pytest.approx(expected, abs=LOGPROB_TOLERANCE)


def submit_all(pipeline: InferencePipeline, reference: Reference, params: SamplingParams) -> list[RequestHandle]:
    with arriving_together(pipeline):
        return [pipeline.submit(prompt, params) for prompt in reference.prompts]


@pytest.mark.parametrize("stages", sorted(DEVICES))
def test_arrivals_prefix_hits_and_forks(
    reference: Reference, stages: int, open_pipeline: Callable[..., InferencePipeline]
) -> None:
    pipeline = open_pipeline(
        reference.path, devices__devices=DEVICES[stages], engine__block_size=BLOCK, engine__kv_cache_tokens=512
    )
    engine = pipeline.engine
    assert len(engine.stages) == stages
    assert sum(stage.part.last - stage.part.first for stage in engine.stages) == LAYERS

    one_by_one = [pipeline.submit(prompt, GREEDY).result(LONGEST_WAIT_S) for prompt in reference.prompts]
    check(reference, one_by_one)

    hits_before = engine.batcher.stats.hit_tokens
    check(
        reference, [handle.result(LONGEST_WAIT_S) for handle in submit_all(pipeline, reference, GREEDY)]
    )  # all at once
    assert engine.batcher.stats.hit_tokens > hits_before, "the second round must have hit the prefix cache"

    staggered: dict[int, RequestHandle] = {}
    following = iter(range(len(LENGTHS)))

    def submit_next() -> None:
        for index in islice(following, 1):
            staggered[index] = pipeline.submit(reference.prompts[index], GREEDY)

    with with_each_step(pipeline, submit_next):  # one more beside each step that runs
        submit_next()  # the engine's thread may have submitted the second before the first is noted here
        until(lambda: len(staggered) == len(LENGTHS), "each request has arrived")
    check(reference, [staggered[index].result(LONGEST_WAIT_S) for index in range(len(LENGTHS))])

    forked = SamplingParams(n=3, max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, detokenize=False, logprobs=0)
    results = [handle.result(LONGEST_WAIT_S) for handle in submit_all(pipeline, reference, forked)]
    assert all(len(result.completions) == 3 for result in results)
    check(reference, results)


@pytest.mark.parametrize("stages", sorted(DEVICES))
def test_chunked_prefill_and_forced_preemption(
    reference: Reference, stages: int, open_pipeline: Callable[..., InferencePipeline]
) -> None:
    """Five tokens a step, and room for two sequences at most: prompts go in pieces and sequences are preempted."""
    pipeline = open_pipeline(
        reference.path,
        devices__devices=DEVICES[stages],
        engine__block_size=BLOCK,
        engine__kv_cache_tokens=40,
        engine__max_num_batched_tokens=5,
        engine__enable_prefix_caching=stages != 2,
    )
    check(reference, [handle.result(LONGEST_WAIT_S) for handle in submit_all(pipeline, reference, GREEDY)])
    assert pipeline.engine.batcher.stats.preemptions > 0
