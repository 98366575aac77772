"""Steps that fail: by a device's or the memory's fault they are computed again, by a request's own it fails alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from steering import LONGEST_WAIT_S, arriving_together
from tiny_models import VOCAB, build_tiny

from core.batching.output import RequestHandle
from core.batching.scheduler import MAX_FAILURES
from core.defaults import DEFAULT_OWNER as OWNER
from core.errors import DeviceLostError, PageMoveError, StepFailedError
from core.execution.step_buffers import InputBatch
from core.inference_pipeline import InferencePipeline
from core.request import SamplingParams

OpenPipeline = Callable[..., InferencePipeline]
PLAIN = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True, detokenize=False, logprobs=1)
KINDS = (PLAIN, replace(PLAIN, temperature=1.0, seed=4), replace(PLAIN, n=2, temperature=1.0, seed=5))
PLACES = ("cpu=64MiB", "cpu=64MiB,cpu=64MiB")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    build_tiny("llama", path)
    return path


def start(open_pipeline: OpenPipeline, llama: Path, **settings: Any) -> InferencePipeline:
    given = {"engine__block_size": 4, "engine__kv_cache_tokens": 2048, "engine__breaker_failures": 100}
    return open_pipeline(llama, **{**given, **settings})


def submit_here(pipeline: InferencePipeline) -> list[RequestHandle]:
    prompts = [[3 + (5 * i + j) % (VOCAB - 4) for j in range(4 + 6 * i)] for i in range(6)]
    return [pipeline.submit(prompt, KINDS[i % 3]) for i, prompt in enumerate(prompts)]


def submit(pipeline: InferencePipeline) -> list[RequestHandle]:
    with arriving_together(pipeline):
        return submit_here(pipeline)


def tokens(handles: list[RequestHandle]) -> list[list[list[int]]]:
    return [[list(c.token_ids) for c in handle.result(LONGEST_WAIT_S).completions] for handle in handles]


class Fault:
    """A stage's forward pass that raises what `wrong` returns for a batch; None: it computes."""

    def __init__(self, stage: Any, wrong: Callable[[InputBatch], Exception | None]) -> None:
        self._forward, self._wrong, self.count = stage.forward, wrong, 0

    def __call__(self, batch: InputBatch, *given: Any) -> torch.Tensor:
        error = self._wrong(batch)
        if error is not None:
            self.count += 1
            raise error
        result: torch.Tensor = self._forward(batch, *given)
        return result


@pytest.mark.parametrize("devices", PLACES)
@pytest.mark.parametrize("cohorts", [1, 3])
@pytest.mark.parametrize(
    "error", [RuntimeError("a kernel broke"), PageMoveError("lost"), DeviceLostError("no answer", device="cpu")]
)
def test_a_fault_that_passes_changes_no_token(
    llama: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch, devices: str, cohorts: int,
    error: Exception,
) -> None:  # fmt: skip
    expected = tokens(submit(start(open_pipeline, llama)))
    pipeline = start(open_pipeline, llama, devices__devices=devices, engine__cohorts=cohorts)
    if isinstance(error, DeviceLostError):
        pipeline.engine.batcher.on_lost = lambda lost: False  # nobody moves the model: the device is back at once
    stage, passes = pipeline.engine.stages[-1], []

    def now_and_then(batch: InputBatch) -> Exception | None:
        passes.append(batch)
        return error if len(passes) in (2, 9, 14) else None

    fault = Fault(stage, now_and_then)
    monkeypatch.setattr(stage, "forward", fault)
    assert tokens(submit(pipeline)) == expected
    assert fault.count == 3
    pipeline.engine.check_invariants()


def test_whose_own_fault_it_is_fails_alone(
    llama: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokens(submit(start(open_pipeline, llama)))
    pipeline = start(open_pipeline, llama)
    stage = pipeline.engine.stages[0]
    poison = VOCAB - 1

    def begins_with_it(batch: InputBatch) -> Exception | None:
        is_it = (batch.input_ids == poison) & (batch.position_ids == 0)
        return RuntimeError("poison") if bool(is_it.any()) else None

    fault = Fault(stage, begins_with_it)
    monkeypatch.setattr(stage, "forward", fault)
    with arriving_together(pipeline):
        handles = submit_here(pipeline)
        culprit = pipeline.submit([poison, 4, 5], PLAIN)
    with pytest.raises(StepFailedError, match="poison"):
        culprit.result(LONGEST_WAIT_S)
    assert tokens(handles) == expected
    assert fault.count == MAX_FAILURES


def of_a_card() -> Exception:
    return torch.OutOfMemoryError("17 GiB")


def of_main_memory() -> Exception:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize("out_of_memory", [of_a_card, of_main_memory])
@pytest.mark.parametrize("devices", PLACES)
def test_memory_that_runs_out_makes_steps_smaller(
    llama: Path,
    open_pipeline: OpenPipeline,
    monkeypatch: pytest.MonkeyPatch,
    devices: str,
    out_of_memory: Callable[[], Exception],
) -> None:
    """Nobody fails, and neither does the circuit breaker open."""
    expected = tokens(submit(start(open_pipeline, llama)))
    pipeline = start(open_pipeline, llama, devices__devices=devices, engine__breaker_failures=1)
    stage = pipeline.engine.stages[0]
    full = out_of_memory()
    fault = Fault(stage, lambda batch: full if batch.num_tokens > 9 else None)
    monkeypatch.setattr(stage, "forward", fault)
    assert tokens(submit(pipeline)) == expected
    assert fault.count >= 1
    assert pipeline.engine.batcher.breaker.state == "closed"


def test_a_failed_step_leaves_none_of_its_blocks_to_be_found(
    llama: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where a later piece of the same prompt was on its way behind it."""
    settings = {"engine__max_num_batched_tokens": 8, "engine__cohorts": 3, "devices__devices": PLACES[1]}
    pipeline = start(open_pipeline, llama, **settings)
    kv, stage, prompt = pipeline.engine.kv, pipeline.engine.stages[-1], [3 + i % 60 for i in range(40)]
    fault = Fault(stage, lambda batch: RuntimeError("broke") if int(batch.position_ids.max()) >= 16 else None)
    monkeypatch.setattr(stage, "forward", fault)
    with pytest.raises(StepFailedError, match="broke"):
        pipeline.submit(prompt, PLAIN).result(LONGEST_WAIT_S)
    found = pipeline.engine.batcher.call(lambda: len(kv.match_prefix([*prompt, 1], kv.chain(OWNER)))).result(
        LONGEST_WAIT_S
    )
    assert found <= 16 // 4
    monkeypatch.undo()
    again = tokens([pipeline.submit(prompt, PLAIN)])
    assert again == tokens([start(open_pipeline, llama).submit(prompt, PLAIN)])
