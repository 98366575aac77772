"""`/api/infer`'s work in the batch: in pieces between other requests' steps, in the queue, and given up like theirs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from steering import LONGEST_WAIT_S, arriving_together, between_steps, until, with_each_step
from tiny_models import build_tiny

from core.batching.sequence import RawAnswer
from core.errors import ConflictError, ContextLengthError, InvalidRequestError, QueueFullError
from core.execution.records import SchedulerOutput
from core.inference_pipeline import InferencePipeline
from core.request import SamplingParams

OpenPipeline = Callable[..., InferencePipeline]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, detokenize=False)
THREE = "cpu=1GiB,cpu=1GiB,cpu=1GiB"
CHUNKED = {"engine__max_num_batched_tokens": 8, "engine__block_size": 4}
PROMPT = [3 + i % 90 for i in range(61)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """A model, and the logits and final hidden states of `PROMPT`."""
    path = tmp_path_factory.mktemp("llama")
    model = build_tiny("llama", path)
    with torch.inference_mode():
        return path, model(torch.tensor([PROMPT])).logits[0], model.base_model(torch.tensor([PROMPT]))[0][0]


@pytest.mark.parametrize("devices", ["cpu=1GiB", THREE])
@pytest.mark.parametrize("cohorts", [1, 3])
def test_pieces_make_what_one_pass_makes(
    llama: tuple[Path, torch.Tensor, torch.Tensor], open_pipeline: OpenPipeline, devices: str, cohorts: int
) -> None:
    path, logits, hidden = llama
    pipeline = open_pipeline(path, devices__devices=devices, engine__cohorts=cohorts, **CHUNKED)
    expected = [
        pipeline.submit(PROMPT[:n], GREEDY).result(LONGEST_WAIT_S).completions[0].token_ids for n in range(3, 9)
    ]
    with arriving_together(pipeline):
        handles = [pipeline.submit(PROMPT[:n], GREEDY) for n in range(3, 9)]
        answers = [RawAnswer(o, p) for o in ("logits", "hidden_states") for p in ("all", "last")]
        raws = [pipeline.submit_raw(PROMPT, answer) for answer in answers]
    for raw in raws:
        assert raw.result(LONGEST_WAIT_S).completions[0].finish_reason == "stop"
    for answer in answers:
        rows = logits if answer.output == "logits" else hidden
        wanted = rows if answer.positions == "all" else rows[-1:]
        torch.testing.assert_close(torch.from_numpy(answer.values()), wanted, atol=2e-4, rtol=1e-3)
    assert [handle.result(LONGEST_WAIT_S).completions[0].token_ids for handle in handles] == expected
    pipeline.engine.check_invariants()


def test_between_two_of_its_pieces_there_is_a_step_for_everybody_else(
    llama: tuple[Path, torch.Tensor, torch.Tensor], open_pipeline: OpenPipeline
) -> None:
    pipeline = open_pipeline(llama[0], **CHUNKED)
    steps: list[SchedulerOutput] = []
    schedule = pipeline.engine.batcher.scheduler.schedule

    def watched(*given: int) -> SchedulerOutput | None:
        output = schedule(*given)
        if output is not None:
            steps.append(output)
        return output

    pipeline.engine.batcher.scheduler.schedule = watched  # type: ignore[assignment, method-assign]
    with arriving_together(pipeline):
        stream = pipeline.submit([5, 6, 7], replace(GREEDY, max_tokens=80))
        answers = [RawAnswer("logits", "last") for _ in range(5)]
        raws = [pipeline.submit_raw(PROMPT, answer) for answer in answers]
    for raw in raws:
        raw.result(LONGEST_WAIT_S)
    stream.result(LONGEST_WAIT_S)
    mixed = [step.record.num_sequences for step in steps]
    pieces = [index for index, step in enumerate(steps) if step.num_tokens > 3 or step.record.raw is not None]
    assert set(mixed) == {1}
    assert max(step.num_tokens for step in steps) <= 8
    assert len(pieces) >= 5 * 8
    busy = steps[: pieces[-1]]
    decodes = [index for index, step in enumerate(busy) if index not in pieces]
    assert max(b - a for a, b in itertools.pairwise(decodes)) <= 2, "the stream goes on with every other step"
    assert sum(step.record.raw is not None for step in steps) == 5, "numbers are computed where they are wanted alone"


@pytest.mark.parametrize("output", ["logits", "hidden_states"])
def test_what_is_computed_again_changes_nothing(
    llama: tuple[Path, torch.Tensor, torch.Tensor], open_pipeline: OpenPipeline, output: str
) -> None:
    """Preempted in the middle, again and again."""
    path, logits, hidden = llama
    pipeline = open_pipeline(path, **CHUNKED)
    scheduler, times = pipeline.engine.batcher.scheduler, [0]

    def preempt() -> None:
        running = [s for s in scheduler._running if s.request.raw is not None and s.num_computed_tokens > 20]
        if running and not running[0].in_flight and times[0] < 3:
            times[0] += 1
            scheduler.start_over()

    answer = RawAnswer(output, "all")  # type: ignore[arg-type]
    with between_steps(pipeline, preempt):
        stream = pipeline.submit([5, 6, 7], replace(GREEDY, max_tokens=60))
        raw = pipeline.submit_raw(PROMPT, answer)
        raw.result(LONGEST_WAIT_S)
        stream.result(LONGEST_WAIT_S)
    assert times[0] == 3
    wanted = logits if output == "logits" else hidden
    torch.testing.assert_close(torch.from_numpy(answer.values()), wanted, atol=2e-4, rtol=1e-3)


def test_a_step_that_fails_has_its_numbers_computed_again(
    llama: tuple[Path, torch.Tensor, torch.Tensor], open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = open_pipeline(llama[0], **CHUNKED)
    execute, calls = pipeline.engine.batcher._runner.execute, [0]

    def failing(output: SchedulerOutput) -> object:
        calls[0] += 1
        if calls[0] in (3, 5):
            raise RuntimeError("a fault that passes")
        return execute(output)

    monkeypatch.setattr(pipeline.engine.batcher._runner, "execute", failing)
    found = pipeline.infer(PROMPT, positions="all")
    assert calls[0] > 8
    torch.testing.assert_close(found, llama[1], atol=2e-4, rtol=1e-3)


def test_it_takes_its_place_in_the_queue_and_gives_it_back(
    llama: tuple[Path, torch.Tensor, torch.Tensor], open_pipeline: OpenPipeline
) -> None:
    pipeline = open_pipeline(llama[0], engine__max_queue=1, engine__max_batch_size=1)
    with arriving_together(pipeline):
        handles = [pipeline.submit_raw(PROMPT, RawAnswer("logits", "last")) for _ in range(2)]
        with pytest.raises(QueueFullError):
            pipeline.infer(PROMPT)
        assert pipeline.engine.batcher.intake.load == (2, 2 * len(PROMPT))
    for handle in handles:
        handle.result(LONGEST_WAIT_S)
    until(lambda: pipeline.engine.batcher.intake.load == (0, 0), "the queue is empty")
    assert pipeline.infer(PROMPT).shape == (1, llama[1].shape[1])


def test_a_client_that_leaves_ends_it_within_a_step(
    llama: tuple[Path, torch.Tensor, torch.Tensor], open_pipeline: OpenPipeline
) -> None:
    pipeline = open_pipeline(llama[0], **CHUNKED)
    batcher, answer = pipeline.engine.batcher, RawAnswer("logits", "all")
    handles = []

    def leave() -> None:
        if len(handles) == 1:
            handles[0].abort()

    with with_each_step(pipeline, leave):
        handles.append(pipeline.submit_raw(PROMPT, answer))
        assert handles[0].result(LONGEST_WAIT_S).completions[0].finish_reason == "abort"
    until(lambda: batcher.num_unfinished == 0, "it has ended")
    assert sum(map(len, answer._parts)) < len(PROMPT)
    pool = pipeline.engine.kv.pool
    assert batcher.call(lambda: pool.num_blocks - pool.num_free).result(LONGEST_WAIT_S) == 0
    with (
        with_each_step(pipeline, lambda: [pipeline.cancel(name) for name in list(batcher.intake._held)]),
        pytest.raises(ConflictError, match="cancelled"),
    ):
        pipeline.infer(PROMPT)


def test_what_is_no_prompt_is_refused(
    llama: tuple[Path, torch.Tensor, torch.Tensor], open_pipeline: OpenPipeline
) -> None:
    pipeline = open_pipeline(llama[0], model__max_model_len=len(PROMPT))
    assert pipeline.infer(PROMPT).shape[0] == 1, "the whole context, since nothing is generated"
    with pytest.raises(ContextLengthError, match="maximum context length is 61 tokens"):
        pipeline.infer([*PROMPT, 5])
    with pytest.raises(InvalidRequestError):
        pipeline.infer([])
    with pytest.raises(InvalidRequestError):
        pipeline.infer([10**6])
