"""The engine under pressure: small pools, vanishing clients, full queues, failing steps."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from steering import LONGEST_WAIT_S, OnEngineThread, arriving_together, until
from tiny_models import VOCAB, build_tiny

from core.batching.output import RequestHandle
from core.batching.scheduler import MAX_FAILURES
from core.errors import CircuitOpenError, EngineDeadError, QueueFullError, StepFailedError
from core.execution.records import SchedulerOutput, StepDone, StepOutput
from core.execution.step_buffers import InputBatch
from core.inference_pipeline import InferencePipeline
from core.request import SamplingParams
from core.views.health import health
from core.views.status import queue_view

OpenPipeline = Callable[..., InferencePipeline]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, detokenize=False)
BLOCK = 4


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    build_tiny("llama", path)
    return path


def prompts(count: int, length: int = 8) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(3, VOCAB, (count, length), generator=generator).tolist()


def wait_idle(pipeline: InferencePipeline) -> None:
    until(lambda: pipeline.engine.batcher.num_unfinished == 0, "all requests have ended")


def used_blocks(pipeline: InferencePipeline) -> int:
    """Blocks in use, counted on the engine thread."""
    pool = pipeline.engine.kv.pool
    return pipeline.engine.batcher.call(lambda: pool.num_blocks - pool.num_free).result(LONGEST_WAIT_S)


def die_after(pipeline: InferencePipeline, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once so many steps have run, the engine dies of a division by zero."""
    batcher = pipeline.engine.batcher
    schedule, last = batcher.scheduler.schedule, batcher.stats.steps + steps
    monkeypatch.setattr(
        batcher.scheduler, "schedule", lambda *given: schedule(*given) if batcher.stats.steps < last else 1 / 0
    )


def test_64_requests_over_a_pool_for_8_all_get_the_right_tokens(llama: Path, open_pipeline: OpenPipeline) -> None:
    roomy = open_pipeline(llama, engine__kv_cache_tokens=4096, engine__block_size=BLOCK)
    expected = [roomy.submit(prompt, GREEDY).result(LONGEST_WAIT_S).completions[0].token_ids for prompt in prompts(64)]

    tight = open_pipeline(
        llama, engine__kv_cache_tokens=8 * 20, engine__block_size=BLOCK, engine__enable_prefix_caching=False
    )
    with arriving_together(tight):
        handles = [tight.submit(prompt, GREEDY) for prompt in prompts(64)]
    assert [handle.result(LONGEST_WAIT_S).completions[0].token_ids for handle in handles] == expected
    assert tight.engine.batcher.stats.preemptions > 0
    assert used_blocks(tight) == 0


def test_200_clients_that_leave_in_mid_stream_leak_nothing(llama: Path, open_pipeline: OpenPipeline) -> None:
    pipeline = open_pipeline(llama, engine__kv_cache_tokens=2048, engine__block_size=BLOCK)
    rng = random.Random(0)
    long = replace(GREEDY, max_tokens=200, n=1)
    steady = pipeline.submit([5, 6, 7], GREEDY)
    for index in range(200):
        handle = pipeline.submit(prompts(200)[index], replace(long, n=rng.choice([1, 1, 3])))
        for _ in range(rng.randrange(3)):
            handle.get(60)
        handle.abort()
    wait_idle(pipeline)
    assert used_blocks(pipeline) == 0
    assert len(steady.result(LONGEST_WAIT_S).completions[0].token_ids) == 12, "the neighbour is unharmed"


def test_an_abort_takes_effect_within_two_steps(llama: Path, open_pipeline: OpenPipeline) -> None:
    pipeline = open_pipeline(llama, engine__block_size=BLOCK)
    handle = pipeline.submit([5, 6, 7], replace(GREEDY, max_tokens=400))
    assert handle.get(60) is not None
    batcher = pipeline.engine.batcher
    handle.abort()
    steps = batcher.call(lambda: batcher.scheduler._steps).result(LONGEST_WAIT_S)
    wait_idle(pipeline)
    assert batcher.call(lambda: batcher.scheduler._steps).result(LONGEST_WAIT_S) <= steps + 2


def test_a_full_queue_refuses_with_a_time_to_come_back(llama: Path, open_pipeline: OpenPipeline) -> None:
    pipeline = open_pipeline(llama, engine__max_queue=2, engine__max_batch_size=1)
    with arriving_together(pipeline):
        handles = [pipeline.submit([5, 6], replace(GREEDY, max_tokens=300)) for _ in range(3)]
        with pytest.raises(QueueFullError) as caught:
            pipeline.submit([5, 6], GREEDY)
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s >= 1
    for handle in handles:
        handle.abort()


def test_lower_priority_values_are_served_earlier(llama: Path, open_pipeline: OpenPipeline) -> None:
    pipeline = open_pipeline(llama, engine__max_batch_size=1)
    told: list[str] = []

    def submit(priority: int) -> RequestHandle:
        sink = OnEngineThread(lambda output: told.append(output.request_id))
        return pipeline.submit_many([([7, 8], GREEDY)], priority=priority, request_id=f"at {priority}", sink=sink)[0]

    with arriving_together(pipeline):
        handles = [submit(5), submit(0), submit(-5)]
    for handle in handles:
        handle.result(LONGEST_WAIT_S)
    assert told == [f"at {priority}-0" for priority in (-5, 0, 5) for _ in range(len(told) // 3)]


def _tokens(output: SchedulerOutput) -> list[int]:
    """Those that a step tells of for the first time."""
    record = output.record
    return [*record.tokens.tolist(), *(token for new in record.new for token in new.token_ids.tolist())]


class FailingRunner:
    """Fails the steps that compute a given token; the rest goes to the real runner."""

    def __init__(self, runner: object, poison: int) -> None:
        self._runner = runner
        self._poison = poison

    def execute(self, output: SchedulerOutput) -> StepOutput:
        if self._poison in _tokens(output):
            raise RuntimeError("the forward pass broke")
        return self._runner.execute(output)  # type: ignore[attr-defined]

    def submit(self, output: SchedulerOutput, done: StepDone) -> None:
        if self._poison in _tokens(output):
            done(output, RuntimeError("the forward pass broke"))
        else:
            self._runner.submit(output, done)  # type: ignore[attr-defined]


def test_a_failing_step_fails_its_batch_alone(llama: Path, open_pipeline: OpenPipeline) -> None:
    pipeline = open_pipeline(llama, engine__block_size=BLOCK)
    batcher = pipeline.engine.batcher
    batcher._runner = FailingRunner(batcher._runner, poison=90)
    with pytest.raises(StepFailedError, match="the forward pass broke"):
        pipeline.submit([5, 90], replace(GREEDY, n=2)).result(LONGEST_WAIT_S)
    assert len(pipeline.submit([5, 6], GREEDY).result(LONGEST_WAIT_S).completions[0].token_ids) == 12
    assert batcher.stats.failed_steps == MAX_FAILURES
    assert used_blocks(pipeline) == 0


def test_steps_that_fail_in_a_row_open_the_breaker_and_it_closes_again(
    llama: Path, open_pipeline: OpenPipeline
) -> None:
    pipeline = open_pipeline(llama, engine__breaker_failures=MAX_FAILURES, engine__breaker_reset_s=20)
    batcher = pipeline.engine.batcher
    now_s = 1000.0
    batcher.breaker._clock = lambda: now_s
    batcher._runner = FailingRunner(batcher._runner, poison=90)
    with pytest.raises(StepFailedError):
        pipeline.submit([90], GREEDY).result(LONGEST_WAIT_S)
    with pytest.raises(CircuitOpenError):
        pipeline.submit([5], GREEDY)
    assert health(pipeline.engine, pipeline.state()).checks["engine"].status == "error"
    assert queue_view(pipeline.engine, pipeline.state()).circuit_breaker["state"] == "open"
    now_s += 20.1
    pipeline.submit([5], GREEDY).result(LONGEST_WAIT_S)
    assert queue_view(pipeline.engine, pipeline.state()).circuit_breaker["state"] == "closed"


def test_a_dead_engine_tells_its_clients_and_health(
    llama: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = open_pipeline(llama)
    die_after(pipeline, 5, monkeypatch)
    handle = pipeline.submit([5, 6], replace(GREEDY, max_tokens=400))
    with pytest.raises(EngineDeadError, match="division by zero"):
        handle.result(LONGEST_WAIT_S)
    with pytest.raises(EngineDeadError):
        pipeline.submit([5], GREEDY)
    report = health(pipeline.engine, pipeline.state())
    assert report.status == "error"
    assert "division by zero" in report.checks["engine"].detail
    assert pipeline.ready()[0] is False


def test_a_sequence_with_broken_logits_fails_alone(
    llama: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = open_pipeline(llama, engine__block_size=BLOCK)
    stage = pipeline.engine.stages[-1]
    forward = stage.forward

    def break_rows(batch: InputBatch, hidden: torch.Tensor | None, wants_hidden: bool) -> torch.Tensor:
        logits, rows = forward(batch, hidden, wants_hidden), batch.logit_rows
        if rows is not None:
            logits = torch.where((batch.input_ids[0, rows] == 90)[:, None], float("nan"), logits)
        return logits

    monkeypatch.setattr(stage, "forward", break_rows)
    with arriving_together(pipeline):
        neighbour = pipeline.submit([5, 6, 7], replace(GREEDY, max_tokens=40, logit_bias={90: -100.0}))
        broken = pipeline.submit([5, 90], replace(GREEDY, n=2))
    with pytest.raises(StepFailedError, match="NaN"):
        broken.result(LONGEST_WAIT_S)
    assert len(neighbour.result(LONGEST_WAIT_S).completions[0].token_ids) == 40
    assert used_blocks(pipeline) == 0


def test_text_that_cannot_be_decoded_fails_its_own_request(
    llama: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = open_pipeline(llama, engine__block_size=BLOCK)
    stream = type(pipeline.model.tokenizer).stream

    def broken(self: object, prompt: list[int], **options: bool) -> object:
        if prompt[0] == 80:
            raise ValueError("no stream")
        opened = stream(self, prompt, **options)
        if prompt[0] == 81:
            monkeypatch.setattr(opened, "push", lambda token: 1 / 0, raising=False)
        return opened

    monkeypatch.setattr(type(pipeline.model.tokenizer), "stream", broken)
    for token, said in ((80, "no stream"), (81, "division by zero|read-only")):
        with arriving_together(pipeline):
            neighbour = pipeline.submit([5, 6, 7], replace(GREEDY, max_tokens=40))
            broke = pipeline.submit([token, 5], replace(GREEDY, detokenize=True))
        with pytest.raises(StepFailedError, match=said):
            broke.result(LONGEST_WAIT_S)
        assert len(neighbour.result(LONGEST_WAIT_S).completions[0].token_ids) == 40
    until(lambda: pipeline.engine.batcher.num_unfinished == 0, "all have ended")
    assert used_blocks(pipeline) == 0


def test_all_clients_hear_of_an_engine_that_cannot_even_end_their_requests(
    llama: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have died of what its own books say."""
    pipeline = open_pipeline(llama)
    monkeypatch.setattr(pipeline.engine.batcher.scheduler, "finish", lambda *_: int("x"))
    die_after(pipeline, 5, monkeypatch)
    with arriving_together(pipeline):
        handles = [pipeline.submit([5, 6], replace(GREEDY, max_tokens=400)) for _ in range(3)]
    for handle in handles:
        with pytest.raises(EngineDeadError, match="division by zero"):
            handle.result(LONGEST_WAIT_S)
