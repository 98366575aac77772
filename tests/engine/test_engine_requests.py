"""What one request may ask: seeds, logprobs, samples, limits, raw inference; and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from steering import LONGEST_WAIT_S, OnEngineThread, arriving_together
from tiny_models import VOCAB, build_tiny

from core.errors import ContextLengthError, InvalidRequestError
from core.inference_pipeline import InferencePipeline
from core.request import RequestOutput, SamplingParams

OpenPipeline = Callable[..., InferencePipeline]
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, detokenize=False)
SEEDED = SamplingParams(max_tokens=16, temperature=1.0, seed=7, ignore_eos=True, detokenize=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    path = tmp_path_factory.mktemp("qwen2")
    return path, build_tiny("qwen2", path)


@pytest.fixture
def pipeline(model: tuple[Path, torch.nn.Module], open_pipeline: OpenPipeline) -> InferencePipeline:
    return open_pipeline(
        model[0], engine__block_size=4, engine__kv_cache_tokens=1024, devices__devices="cpu=64MiB,cpu=64MiB"
    )


def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch(pipeline: InferencePipeline) -> None:
    alone = pipeline.submit([5, 6, 7], SEEDED).result(LONGEST_WAIT_S).completions[0].token_ids
    with arriving_together(pipeline):
        crowd = [pipeline.submit([8 + i, 9, 10], replace(SEEDED, seed=i, temperature=1.3)) for i in range(9)]
        together = pipeline.submit([5, 6, 7], SEEDED)
    assert together.result(LONGEST_WAIT_S).completions[0].token_ids == alone
    for handle in crowd:
        handle.result(LONGEST_WAIT_S)
    other = pipeline.submit([5, 6, 7], replace(SEEDED, seed=8)).result(LONGEST_WAIT_S).completions[0].token_ids
    assert other != alone


def test_samples_of_one_prompt_differ_and_share_its_blocks(pipeline: InferencePipeline) -> None:
    result = pipeline.submit(list(range(5, 25)), replace(SEEDED, n=4)).result(LONGEST_WAIT_S)
    assert [completion.index for completion in result.completions] == [0, 1, 2, 3]
    assert len({tuple(completion.token_ids) for completion in result.completions}) == 4


def test_forked_samples_use_fewer_blocks_than_separate_ones(pipeline: InferencePipeline) -> None:
    kv, batcher = pipeline.engine.kv, pipeline.engine.batcher
    started: set[int] = set()
    blocks: list[tuple[int, int]] = []

    def look(output: RequestOutput) -> None:
        """When all four have begun: blocks in use, and what the four would need if each had all of its own."""
        started.update(delta.index for delta in output.deltas)
        if len(started) == 4 and not blocks:
            lengths = [len(sequence.token_ids) for sequence in batcher.scheduler.live_sequences()]
            blocks.append((kv.pool.num_blocks - kv.pool.num_free, sum(map(kv.blocks_for, lengths))))

    prompt = list(range(5, 69))  # 16 blocks of 4
    (handle,) = pipeline.submit_many([(prompt, replace(SEEDED, n=4, max_tokens=20))], sink=OnEngineThread(look))
    handle.result(LONGEST_WAIT_S)
    used, separate = blocks[0]
    assert separate >= 4 * 16
    assert used <= separate - 3 * 15, "the four share the fifteen blocks of their prompt that none writes to"


def test_best_of_returns_the_most_likely(pipeline: InferencePipeline) -> None:
    params = replace(SEEDED, n=4, logprobs=0)
    every = pipeline.submit([5, 6, 7], params).result(LONGEST_WAIT_S).completions
    best = pipeline.submit([5, 6, 7], replace(params, n=1, best_of=4)).result(LONGEST_WAIT_S)
    assert len(best.completions) == 1
    likeliest = max(every, key=lambda completion: completion.cumulative_logprob)
    assert best.completions[0].token_ids == likeliest.token_ids
    assert best.num_generated_tokens == 4 * 16


def test_prompt_logprobs_match_the_model(pipeline: InferencePipeline, model: tuple[Path, torch.nn.Module]) -> None:
    prompt = list(range(5, 45))
    with torch.inference_mode():
        rows = model[1](torch.tensor([prompt])).logits[0].log_softmax(-1)
    pipeline.submit(prompt, GREEDY).result(LONGEST_WAIT_S)  # fills the prefix cache, which must not swallow logprobs
    result = pipeline.submit(prompt, replace(GREEDY, prompt_logprobs=2)).result(LONGEST_WAIT_S)
    assert result.prompt_logprobs is not None
    assert result.prompt_logprobs[0] is None
    assert len(result.prompt_logprobs) == len(prompt)
    for position, item in enumerate(result.prompt_logprobs[1:], start=1):
        assert item is not None
        assert item.token_id == prompt[position]
        assert item.logprob == pytest.approx(rows[position - 1, prompt[position]].item(), abs=2e-4)
        assert item.top[0][1] == pytest.approx(rows[position - 1].max().item(), abs=2e-4)


def test_prompt_logprobs_survive_chunked_prefill(
    model: tuple[Path, torch.nn.Module], open_pipeline: OpenPipeline
) -> None:
    small = open_pipeline(model[0], engine__max_num_batched_tokens=7, engine__block_size=4)
    prompt = list(range(5, 45))
    whole = small.submit(prompt, replace(GREEDY, prompt_logprobs=0)).result(LONGEST_WAIT_S)
    assert whole.prompt_logprobs is not None
    assert [item.token_id for item in whole.prompt_logprobs[1:] if item] == prompt[1:]


def test_raw_inference_returns_the_models_logits(
    pipeline: InferencePipeline, model: tuple[Path, torch.nn.Module]
) -> None:
    prompt = list(range(5, 30))
    with torch.inference_mode():
        logits = model[1](torch.tensor([prompt])).logits[0]
        hidden = model[1].base_model(torch.tensor([prompt]))[0][0]
    torch.testing.assert_close(pipeline.infer(prompt, positions="all"), logits, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(pipeline.infer(prompt), logits[-1:], atol=2e-4, rtol=1e-3)
    got = pipeline.infer(prompt, output="hidden_states", positions="all")
    torch.testing.assert_close(got, hidden, atol=2e-4, rtol=1e-3)


def test_max_tokens_end_at_the_context(model: tuple[Path, torch.nn.Module], open_pipeline: OpenPipeline) -> None:
    short = open_pipeline(model[0], model__max_model_len=20)
    result = short.submit([5] * 10, replace(GREEDY, max_tokens=None)).result(LONGEST_WAIT_S)
    assert len(result.completions[0].token_ids) == 10
    assert result.completions[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "changes", "error", "param"),
    [
        ([], {}, InvalidRequestError, "prompt"),
        ([VOCAB], {}, InvalidRequestError, "prompt"),
        ([-1], {}, InvalidRequestError, "prompt"),
        ([True], {}, InvalidRequestError, "prompt"),
        ([5] * 2000, {}, ContextLengthError, "prompt"),
        ([5], {"max_tokens": 2000}, ContextLengthError, "max_tokens"),
        ([5], {"n": 0}, InvalidRequestError, "n"),
        ([5], {"n": 10**6}, InvalidRequestError, "n"),
        ([5], {"best_of": 1, "n": 2}, InvalidRequestError, "best_of"),
        ([5], {"temperature": -1.0}, InvalidRequestError, "temperature"),
        ([5], {"temperature": float("nan")}, InvalidRequestError, "temperature"),
        ([5], {"top_p": -0.5}, InvalidRequestError, "top_p"),
        ([5], {"logprobs": 10**6}, InvalidRequestError, "logprobs"),
        ([5], {"stop": ("x",) * 5000, "detokenize": True}, InvalidRequestError, "stop"),
        ([5], {"stop_token_ids": (VOCAB,)}, InvalidRequestError, "stop_token_ids"),
        ([5], {"logit_bias": {VOCAB: 1.0}}, InvalidRequestError, "logit_bias"),
        ([5], {"seed": 2**70}, InvalidRequestError, "seed"),
        ([5], {"min_tokens": 9}, InvalidRequestError, "min_tokens"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_allocated(
    pipeline: InferencePipeline, prompt: list[int], changes: dict[str, object], error: type[Exception], param: str
) -> None:
    with arriving_together(pipeline):
        neighbour = pipeline.submit([5, 6], GREEDY)
        with pytest.raises(error) as caught:
            pipeline.submit(prompt, replace(GREEDY, **changes))  # type: ignore[arg-type]
    assert caught.value.param == param  # type: ignore[attr-defined]
    assert len(neighbour.result(LONGEST_WAIT_S).completions[0].token_ids) == 8
