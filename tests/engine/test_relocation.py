"""A model that moves to other devices while it serves: nobody's answer changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from steering import LONGEST_WAIT_S, Brake, arriving_together, until
from tiny_models import VOCAB, build_tiny

from core.batching.output import RequestHandle
from core.engine import relocation
from core.engine.builder import EngineBuilder
from core.engine.model_engine import ModelEngine
from core.errors import ConflictError, ContextLengthError, DeviceLostError, UnavailableError
from core.inference_pipeline import InferencePipeline
from core.request import GenerationResult, SamplingParams

OpenPipeline = Callable[..., InferencePipeline]
TOKENS = 120
PLACES = {1: "cpu=48MiB", 2: "cpu=48MiB,cpu=48MiB", 3: "cpu=48MiB,cpu=48MiB,cpu=48MiB"}
CUTS = {1: None, 2: "2,2", 3: "1,2,1"}
PLAIN = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True, logprobs=2)
KINDS = (
    PLAIN,
    replace(PLAIN, temperature=1.0, seed=3, logprobs=None),
    replace(PLAIN, temperature=0.8, top_p=0.9, seed=4, presence_penalty=0.5, repetition_penalty=1.2),
    replace(PLAIN, n=2, temperature=1.0, seed=5),
    replace(PLAIN, stop=("zz", "q"), logprobs=None, temperature=1.0, seed=6),
    replace(PLAIN, prompt_logprobs=1, min_tokens=8),
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    build_tiny("llama", path)
    return path


def requests(count: int) -> list[tuple[list[int], SamplingParams]]:
    """Of all kinds; every other one begins like those before it."""
    common = [3 + i % (VOCAB - 3) for i in range(20)]
    return [([*(common if index % 2 else []), 5 + index % 40, 7], KINDS[index % len(KINDS)]) for index in range(count)]


def open_on(open_pipeline: OpenPipeline, model: Path, place: int = 1, **settings: Any) -> InferencePipeline:
    return open_pipeline(
        model, **{"devices__devices": PLACES[place], "devices__layers": CUTS[place], "engine__block_size": 4,
                  "engine__kv_cache_tokens": 8192, **settings},
    )  # fmt: skip


def submit(pipeline: InferencePipeline, count: int) -> list[RequestHandle]:
    with arriving_together(pipeline):
        return [pipeline.submit(prompt, params) for prompt, params in requests(count)]


def results(handles: list[RequestHandle]) -> list[GenerationResult]:
    return [handle.result(LONGEST_WAIT_S) for handle in handles]


def same(found: list[GenerationResult], expected: list[GenerationResult]) -> None:
    for result, reference in zip(found, expected, strict=True):
        for one, other in zip(result.completions, reference.completions, strict=True):
            assert one.token_ids == other.token_ids
            assert one.text == other.text
            assert (one.finish_reason, one.stop_reason) == (other.finish_reason, other.stop_reason)
            assert [p.logprob for p in one.logprobs] == pytest.approx([p.logprob for p in other.logprobs], abs=2e-4)
        mine, theirs = (
            [None if p is None else p.logprob for p in each.prompt_logprobs or ()] for each in (result, reference)
        )
        assert mine[1:] == pytest.approx(theirs[1:], abs=2e-4)


@pytest.mark.slow
def test_32_streams_while_the_model_moves_ten_times(
    llama: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = results(submit(open_on(open_pipeline, llama), 32))
    pipeline = open_on(open_pipeline, llama)
    brake = Brake(pipeline, monkeypatch)
    handles = submit(pipeline, 32)
    ways = []
    for place in (2, 3, 1) * 3 + (2,):
        brake.go_on(8)
        assert not all(handle.finished for handle in handles), "nothing is left to be moved"
        ways.append(pipeline.place(devices=PLACES[place], layers=CUTS[place]))
        assert [stage.device.name for stage in pipeline.engine.stages] == [stage.device for stage in ways[-1].stages]
    brake.steps = 1 << 30
    same(results(handles), expected)
    longest = max(ways, key=lambda way: way.pause_seconds or 0)
    print(f"longest pause {longest.pause_seconds} s of a move of {longest.seconds} s, {longest.read_bytes} bytes read")


def test_what_stays_on_its_device_is_not_read_again(
    llama: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = open_on(open_pipeline, llama, place=2)
    before = {name: p.data_ptr() for name, p in pipeline.engine.stages[0]._model.named_parameters()}
    handles = submit(pipeline, 4)
    read: list[int] = []
    begin = EngineBuilder.__init__

    def counted(self: EngineBuilder, *args: Any, on_read: Any, **named: Any) -> None:
        begin(self, *args, on_read=lambda nbytes: (read.append(nbytes), on_read(nbytes)), **named)

    monkeypatch.setattr(EngineBuilder, "__init__", counted)
    moved = pipeline.place(devices=PLACES[3], layers="2,1,1")
    after = {name: p.data_ptr() for name, p in pipeline.engine.stages[0]._model.named_parameters()}
    assert after == before
    assert moved.kept_bytes >= sum(stage.weight_bytes for stage in pipeline.engine.plan.placement.stages[:1])
    assert 0 < sum(read) <= moved.read_bytes
    assert all(stage.beside for stage in moved.stages)
    results(handles)


def test_a_dry_run_says_what_would_be_and_changes_nothing(llama: Path, open_pipeline: OpenPipeline) -> None:
    pipeline = open_on(open_pipeline, llama)
    engine = pipeline.engine
    outlook = pipeline.place(devices=PLACES[2], layers="1,3", dry_run=True)
    assert pipeline.engine is engine
    assert outlook.dry_run and outlook.seconds is None
    assert [(stage.device, stage.layers) for stage in outlook.stages] == [("cpu#0", (0, 0)), ("cpu#1", (1, 3))]
    assert outlook.read_bytes > 0
    assert outlook.estimated_seconds >= outlook.estimated_pause_seconds >= 0


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("at", ["load_stage", "finish"])
def test_a_move_that_fails_changes_nothing(
    llama: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch, at: str, tight: bool
) -> None:
    """Also if the old engine had to make room for the new one."""
    expected = results(submit(open_on(open_pipeline, llama), 8))
    pipeline = open_on(open_pipeline, llama)
    handles = submit(pipeline, 8)
    handles[0].get(60)
    if tight:
        monkeypatch.setattr(relocation.Relocator, "_all_fits", lambda *_: False)
    original, calls = getattr(EngineBuilder, at), []

    def broken(self: EngineBuilder, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("the disk is gone")
        return original(self, *args)

    monkeypatch.setattr(EngineBuilder, at, broken)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        pipeline.place(devices=PLACES[2], layers="2,2")
    assert [stage.device.name for stage in pipeline.engine.stages] == ["cpu"]
    first, *others = results(handles)
    same(others, expected[1:])
    assert (
        first.completions[0].token_ids == expected[0].completions[0].token_ids[-len(first.completions[0].token_ids) :]
    )


@pytest.mark.parametrize("percent", [75, 105])
def test_where_both_do_not_fit_the_old_one_makes_room(llama: Path, open_pipeline: OpenPipeline, percent: int) -> None:
    """Also on a device that is given less than before."""
    expected = results(submit(open_on(open_pipeline, llama), 8))
    pipeline = open_on(open_pipeline, llama)
    used = pipeline.engine.budgets["cpu"].used_bytes
    handles = submit(pipeline, 8)
    pipeline.place(devices=f"cpu={used * percent // 100}B")
    budget = pipeline.engine.budgets["cpu"]
    assert budget.device.memory_limit_bytes == used * percent // 100
    same(results(handles), expected)
    budget.check_invariants()


def test_a_request_that_would_not_fit_keeps_the_model_where_it_is(
    llama: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = open_on(open_pipeline, llama, engine__kv_cache_tokens=256)
    engine, base = pipeline.engine, pipeline.engine.settings
    (stage,), inbox = engine.stages, engine.batcher.intake.inbox
    forward, calls = stage.forward, []

    def wait_for_the_end(*args: Any) -> Any:
        """After the first token, so that the request still runs when the batcher parks."""
        calls.append(args)
        if len(calls) == 2:
            until(lambda: inbox.qsize() > 0, "the batcher is to park")
        return forward(*args)

    monkeypatch.setattr(stage, "forward", wait_for_the_end)
    handle = pipeline.submit([5, 6, 7], replace(PLAIN, max_tokens=200, n=1))
    handle.get(60)
    engine.settings = base.model_copy(update={"engine": base.engine.model_copy(update={"kv_cache_tokens": 64})})
    with pytest.raises(ConflictError, match="203 tokens"):
        pipeline.place(devices=PLACES[2], layers="2,2")
    assert pipeline.engine is engine
    assert handle.result(LONGEST_WAIT_S).completions[0].finish_reason == "length"


def test_a_request_that_comes_too_late_to_be_looked_at_is_told_that_it_does_not_fit(
    llama: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = open_on(open_pipeline, llama, engine__kv_cache_tokens=256)
    base, look, late = pipeline.engine.settings, relocation.Relocator._check_lengths, []

    def submit_after(self: relocation.Relocator, engine: ModelEngine | None) -> None:
        look(self, engine)
        late.extend(pipeline.submit([5, 6, 7], replace(PLAIN, max_tokens=most, n=1)) for most in (200, 20, None))

    monkeypatch.setattr(relocation.Relocator, "_check_lengths", submit_after)
    smaller = base.engine.model_copy(update={"kv_cache_tokens": 64})
    pipeline.engine.settings = base.model_copy(update={"engine": smaller})
    pipeline.place(devices=PLACES[2], layers="2,2")
    with pytest.raises(ContextLengthError, match=r"maximum context length is 64 tokens where .* come to 203"):
        late[0].result(LONGEST_WAIT_S)
    assert [len(handle.result(LONGEST_WAIT_S).completions[0].token_ids) for handle in late[1:]] == [20, 61]
    until(lambda: pipeline.engine.batcher.num_unfinished == 0, "all have ended")


@pytest.mark.parametrize("cohorts", [1, 3])
def test_a_device_that_is_lost_is_left(
    llama: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch, cohorts: int
) -> None:
    expected = results(submit(open_on(open_pipeline, llama), 12))
    pipeline = open_on(open_pipeline, llama, place=3, engine__cohorts=cohorts)
    engine = pipeline.engine
    stage = engine.stages[1]
    forward, calls = stage.forward, []

    def gone(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > 20:
            raise DeviceLostError("no answer", device=stage.device.name)
        return forward(*args)

    monkeypatch.setattr(stage, "forward", gone)
    same(results(submit(pipeline, 12)), expected)
    assert pipeline.engine is not engine
    assert stage.device.name not in [each.device.name for each in pipeline.engine.stages]


def test_a_model_that_cannot_leave_a_lost_device_says_so_until_one_is_loaded(
    llama: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = open_on(open_pipeline, llama, place=2)
    stage = pipeline.engine.stages[1]
    gone = DeviceLostError("no answer", device=stage.device.name)
    monkeypatch.setattr(stage, "forward", Mock(side_effect=gone))
    monkeypatch.setattr(pipeline._keeper.recovery, "_relocate", Mock(side_effect=RuntimeError("a broken file")))
    (handle,) = submit(pipeline, 1)
    with pytest.raises(DeviceLostError):
        handle.result(LONGEST_WAIT_S)
    told = f"cannot run without {gone.device}; load it again"
    assert told in pipeline.ready()[1]
    with pytest.raises(UnavailableError, match=told):
        submit(pipeline, 1)
    until(lambda: not pipeline.loading, "the attempt to move has ended")
    pipeline.load()
    assert pipeline.ready() == (True, "ready")
    assert results(submit(pipeline, 1))


@pytest.mark.parametrize("lost", [0, 1])
def test_ends_that_share_a_weight_come_together_without_a_second_copy(
    llama: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    """What is left of a tied model has the embedding or the head, and becomes a stage with both."""
    expected = results(submit(open_on(open_pipeline, llama), 2))
    pipeline = open_on(open_pipeline, llama, place=2)
    engine = pipeline.engine
    assert engine.plan.costs.tied
    gone = DeviceLostError("no answer", device=engine.stages[lost].device.name)
    monkeypatch.setattr(engine.stages[lost], "forward", Mock(side_effect=gone))
    same(results(submit(pipeline, 2)), expected)
    (stage,), (placed,) = pipeline.engine.stages, pipeline.engine.plan.placement.stages
    assert stage.device.name != gone.device
    assert stage.weight_bytes == placed.weight_bytes
    assert pipeline.engine.budgets[stage.device.name].used_by_purpose()["weights"] == placed.weight_bytes


def test_new_requests_find_the_engine_that_serves(llama: Path, open_pipeline: OpenPipeline) -> None:
    pipeline = open_on(open_pipeline, llama)
    model = pipeline.model
    pipeline.place(devices=PLACES[2], layers="2,2")
    (handle,) = pipeline.submit_many([([5, 6], PLAIN)], model=model)
    assert len(handle.result(LONGEST_WAIT_S).completions[0].token_ids) == TOKENS
    assert pipeline.model.created == model.created
