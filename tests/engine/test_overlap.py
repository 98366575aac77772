"""Several steps in flight: stages work at the same time, and nothing else changes."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from steering import LONGEST_WAIT_S, OnEngineThread, arriving_together, until
from tiny_models import VOCAB, build_tiny

from core.execution.step_buffers import InputBatch
from core.inference_pipeline import InferencePipeline
from core.request import RequestOutput, SamplingParams

BLOCK = 4
THREE = "cpu=64MiB,cpu=64MiB,cpu=64MiB"
PATIENCE_S = 40.0
"""How long calls wait for each other that have to meet."""
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, detokenize=False)

OpenPipeline = Callable[..., InferencePipeline]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    build_tiny("llama", path)
    return path


def some_prompts(count: int) -> list[list[int]]:
    source = random.Random(4)
    shared = [source.randrange(3, VOCAB) for _ in range(9)]
    lengths = [source.choice((1, 3, 8, 17, 40)) for _ in range(count)]
    return [shared[: source.choice((0, 9))] + [source.randrange(3, VOCAB) for _ in range(n)] for n in lengths]


def answers(pipeline: InferencePipeline, prompts: list[list[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
    with arriving_together(pipeline):
        handles = [pipeline.submit(prompt, params, priority=index % 3) for index, prompt in enumerate(prompts)]
    return [handle.result(LONGEST_WAIT_S).completions[0].token_ids for handle in handles]


@pytest.mark.parametrize("cohorts", [2, 3, 7])
@pytest.mark.parametrize("kv_tokens", [2048, 160], ids=["roomy", "tight"])
def test_tokens_do_not_depend_on_the_number_of_cohorts(
    llama: Path, open_pipeline: OpenPipeline, cohorts: int, kv_tokens: int
) -> None:
    options = {"devices__devices": THREE, "engine__block_size": BLOCK, "engine__max_num_batched_tokens": 16}
    prompts = some_prompts(24)
    plain = open_pipeline(llama, engine__cohorts=1, engine__kv_cache_tokens=2048, **options)
    many = open_pipeline(llama, engine__cohorts=cohorts, engine__kv_cache_tokens=kv_tokens, **options)
    expected = answers(plain, prompts)
    assert answers(many, prompts) == expected
    assert answers(many, prompts) == expected, "with the prefix cache"
    seeded = replace(GREEDY, temperature=1.0, seed=5, presence_penalty=0.5)
    assert answers(many, prompts, seeded) == answers(plain, prompts, seeded)
    if kv_tokens < 1000:
        assert many.engine.batcher.stats.preemptions > 0


def meet(
    first: tuple[object, str],
    second: tuple[object, str],
    monkeypatch: pytest.MonkeyPatch,
    patience_s: float = PATIENCE_S,
) -> threading.Event:
    """Calls of two methods, of which the second takes what the first has made, wait for each other once a step has
    been through both (prompts that arrive together share it) and another through the first. The event says that they
    have met."""
    met, barrier = threading.Event(), threading.Barrier(2)

    def patch(owner: object, name: str, free: int) -> None:
        method, calls = getattr(owner, name), itertools.count()

        def wait_for_the_other(*given: Any) -> Any:
            if next(calls) >= free and not met.is_set() and not barrier.broken:
                with contextlib.suppress(threading.BrokenBarrierError):
                    barrier.wait(patience_s)
                    met.set()
            return method(*given)

        monkeypatch.setattr(owner, name, wait_for_the_other)

    patch(*first, free=2)
    patch(*second, free=1)
    return met


@pytest.mark.parametrize("cohorts", [1, 2])
def test_stages_work_at_the_same_time(
    llama: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch, cohorts: int
) -> None:
    pipeline = open_pipeline(llama, devices__devices="cpu=64MiB,cpu=64MiB", engine__cohorts=cohorts)
    first, second = pipeline.engine.stages
    met = meet((first, "forward"), (second, "forward"), monkeypatch, PATIENCE_S if cohorts == 2 else 0.2)
    answers(pipeline, [[5, 6], [7, 8]], replace(GREEDY, max_tokens=3))
    assert met.is_set() == (cohorts == 2)


def test_one_stream_never_leaves_the_engine_thread(
    llama: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = open_pipeline(llama, devices__devices=THREE, engine__cohorts=3)
    submitted = []
    submit = pipeline.engine.runner.submit
    monkeypatch.setattr(pipeline.engine.runner, "submit", lambda *args: (submitted.append(args[0]), submit(*args)))
    (alone,) = answers(pipeline, [[5, 6, 7]])
    assert len(alone) == GREEDY.max_tokens
    assert submitted == []
    answers(pipeline, [[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    assert submitted, "and several do"


def test_one_cohort_is_sampled_while_the_last_stage_computes_another(
    llama: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = open_pipeline(llama, devices__devices="cpu=64MiB,cpu=64MiB", engine__cohorts=2)
    met = meet((pipeline.engine.stages[-1], "forward"), (pipeline.engine.stages[-1]._results, "make"), monkeypatch)
    answers(pipeline, [[5, 6], [7, 8]], replace(GREEDY, max_tokens=6))
    assert met.is_set()


def test_chunks_of_one_prompt_follow_each_other_through_the_stages(
    llama: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = open_pipeline(llama, devices__devices="cpu=64MiB,cpu=64MiB", engine__max_num_batched_tokens=16)
    prompt = [3 + i % (VOCAB - 3) for i in range(100)]
    expected = answers(pipeline, [prompt])
    pipeline.engine.batcher.call(pipeline.engine.kv.forget_cached).result(LONGEST_WAIT_S)
    first, second = pipeline.engine.stages
    met = meet((first, "forward"), (second, "forward"), monkeypatch)
    assert answers(pipeline, [prompt]) == expected
    assert met.is_set()


def test_a_step_that_fails_in_flight_is_computed_again(
    llama: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = open_pipeline(llama, devices__devices=THREE, engine__block_size=BLOCK, engine__cohorts=6)
    stage = pipeline.engine.stages[1]
    forward = stage.forward
    beside: list[int] = []

    def fail_long(batch: InputBatch, hidden: torch.Tensor | None, wants_hidden: bool) -> torch.Tensor:
        if not beside and batch.num_tokens >= 16 and batch.attention.host_seq_lens[-1] >= 64:
            beside.append(len(batch.attention.host_seq_lens) - 1)
            raise RuntimeError("the link broke")
        return forward(batch, hidden, wants_hidden)

    monkeypatch.setattr(stage, "forward", fail_long)
    with arriving_together(pipeline):
        neighbours = [pipeline.submit([5 + i, 6], replace(GREEDY, max_tokens=60)) for i in range(4)]
        long = pipeline.submit([9] * 120, GREEDY)
    found = [list(handle.result(LONGEST_WAIT_S).completions[0].token_ids) for handle in (*neighbours, long)]
    assert beside, "a step has failed"
    plain = open_pipeline(llama, engine__block_size=BLOCK)
    expected = answers(plain, [[5 + i, 6] for i in range(4)], replace(GREEDY, max_tokens=60))
    assert found == [*expected, *answers(plain, [[9] * 120])]
    pool = pipeline.engine.kv.pool
    pipeline.engine.batcher.call(pipeline.engine.batcher.scheduler.check_invariants).result(LONGEST_WAIT_S)
    assert pool.num_free == pool.num_blocks


def test_aborts_in_flight_leave_nothing_behind(llama: Path, open_pipeline: OpenPipeline) -> None:
    pipeline = open_pipeline(llama, devices__devices=THREE, engine__block_size=BLOCK, engine__cohorts=4)
    source = random.Random(1)
    for _ in range(40):
        handles = [pipeline.submit(prompt, replace(GREEDY, max_tokens=200)) for prompt in some_prompts(5)]
        handles[0].get(60)
        source.shuffle(handles)
        for handle in handles:
            handle.abort()
        for handle in handles:
            handle.result(LONGEST_WAIT_S)
    pool = pipeline.engine.kv.pool
    pipeline.engine.batcher.call(pipeline.engine.batcher.scheduler.check_invariants).result(LONGEST_WAIT_S)
    assert pool.num_free == pool.num_blocks


def test_raw_inference_waits_for_the_steps_in_flight(llama: Path, open_pipeline: OpenPipeline) -> None:
    pipeline = open_pipeline(llama, devices__devices=THREE, engine__block_size=BLOCK)
    quiet = pipeline.infer([5, 6, 7], output="logits", positions="last")
    with arriving_together(pipeline):
        handles = [pipeline.submit(prompt, replace(GREEDY, max_tokens=100)) for prompt in some_prompts(6)]
    for _ in range(5):
        torch.testing.assert_close(pipeline.infer([5, 6, 7], output="logits", positions="last"), quiet)
    for handle in handles:
        handle.result(LONGEST_WAIT_S)


@pytest.mark.parametrize(("count", "cohorts"), [(16, 3), (5, 4), (7, 2), (3, 3)])
def test_nobody_is_left_over_when_shares_do_not_come_out_even(
    llama: Path, open_pipeline: OpenPipeline, count: int, cohorts: int
) -> None:
    """None of these ends by itself for a long time, so each must get its first token beside all the others."""
    pipeline = open_pipeline(llama, devices__devices=THREE, engine__cohorts=cohorts, engine__kv_cache_tokens=8192)
    begun: set[str] = set()
    ended_before_others_began: list[str] = []

    def look(output: RequestOutput) -> None:
        begun.add(output.request_id)
        if output.finished and len(begun) < count:
            ended_before_others_began.append(output.request_id)

    asked = [([5 + i, 6, 7], replace(GREEDY, max_tokens=400)) for i in range(count)]
    with arriving_together(pipeline):
        handles = pipeline.submit_many(asked, sink=OnEngineThread(look))
    until(lambda: len(begun) == count, "everybody has a token")
    assert ended_before_others_began == [], "nobody waited for another to end"
    for handle in handles:
        handle.abort()
    until(lambda: all(handle.finished for handle in handles), "all are aborted")
