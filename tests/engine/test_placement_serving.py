"""Placement as it is served: every strategy gives the same tokens, budgets hold, memory that is gone is noticed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from steering import LONGEST_WAIT_S, arriving_together
from tiny_models import VOCAB, build_tiny

from core.costs import PlacementPlan, PlacementProblem, Sharing
from core.devices import Device
from core.engine import builder, keeper
from core.engine.model_plan import ModelPlan
from core.errors import InsufficientMemoryError, InvalidRequestError
from core.inference_pipeline import InferencePipeline
from core.placement import engine as placement_engine
from core.placement.engine import build_plan, register_strategy
from core.placement.programme import Cut
from core.profiling.profiler import LayerProfiler
from core.request import SamplingParams
from core.views.render import render
from core.views.status import pipeline_view

GREEDY = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True, detokenize=False)
THREE = "cpu=64MiB,cpu=64MiB,cpu=64MiB"
SLOW_AND_FAST = "sim=64MiB@4MB/s/1GFLOPS,sim=64MiB@40MB/s/10GFLOPS"

OpenPipeline = Callable[..., InferencePipeline]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    build_tiny("llama", path)
    return path


@pytest.fixture
def backwards() -> Iterator[str]:
    """A strategy of one's own: the devices in reverse order."""

    def last_first(request: PlacementProblem) -> PlacementPlan:
        return build_plan(request, "backwards", [Cut(2, 0, 1), Cut(1, 1, 2), Cut(0, 2, request.costs.num_layers)])

    register_strategy("backwards", last_first)
    yield "backwards"
    del placement_engine._STRATEGIES["backwards"]


def shown(pipeline: InferencePipeline) -> Any:
    """`/api/pipeline/status`."""
    return render(pipeline_view(pipeline.current_engine, pipeline.state()))


def prompts() -> list[list[int]]:
    source = random.Random(8)
    return [[source.randrange(3, VOCAB) for _ in range(source.choice((1, 5, 23)))] for _ in range(12)]


def answers(pipeline: InferencePipeline, params: SamplingParams = GREEDY) -> list[list[int]]:
    with arriving_together(pipeline):
        handles = [pipeline.submit(prompt, params) for prompt in prompts()]
    return [handle.result(LONGEST_WAIT_S).completions[0].token_ids for handle in handles]


@pytest.mark.parametrize("cohorts", [1, 3])
@pytest.mark.parametrize("strategy", ["profiled", "vram", "balanced", "backwards", "1,2,1", "0,1,3"])
def test_tokens_do_not_depend_on_the_placement(
    llama: Path, open_pipeline: OpenPipeline, backwards: str, strategy: str, cohorts: int
) -> None:
    by_hand = "," in strategy
    placed = {"devices__layers": strategy} if by_hand else {"devices__placement": strategy}
    pipeline = open_pipeline(llama, devices__devices=THREE, engine__cohorts=cohorts, **placed)
    plan = pipeline.engine.plan.placement
    assert plan.strategy == ("by hand" if by_hand else strategy)
    if strategy == backwards:
        assert [stage.device_name for stage in plan.stages] == ["cpu#2", "cpu#1", "cpu#0"]
    if by_hand:
        assert [stage.num_layers for stage in plan.stages] == [int(n) for n in strategy.split(",") if n != "0"]
    assert answers(pipeline) == answers(open_pipeline(llama))


def test_the_faster_device_gets_the_model_and_status_compares(llama: Path, open_pipeline: OpenPipeline) -> None:
    pipeline = open_pipeline(llama, devices__devices=SLOW_AND_FAST, devices__placement="profiled")
    plan = pipeline.engine.plan
    assert [stage.device_name for stage in plan.placement.stages] == ["sim#1"]
    assert plan.placement.unused_devices == ("sim#0",)
    assert plan.prediction is not None
    (effect,) = plan.prediction.unused
    assert effect.gain is not None
    assert effect.gain < 0, "using the slow device would cost something, and the plan says so"
    answers(pipeline)
    status = shown(pipeline)
    (stage,) = status["stages"]
    assert stage["busy_seconds"] >= stage["predicted_seconds"] > 0, "an emulated device keeps to the prediction"
    assert stage["seconds_per_forward"] == pytest.approx(stage["busy_seconds"] / stage["forwards"], rel=0.01)
    assert set(status["prediction"]["tokens_per_second"]) == {"1", "8", "32"}


def test_stages_are_compared_with_what_they_take_beside_each_other(
    llama: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of one processor are predicted to be slower while several steps are in flight, and only then."""
    slow = Sharing("cpu", 2, 1000.0, 1000.0)
    monkeypatch.setattr(LayerProfiler, "_sharing", lambda self, parts, architecture, refresh: slow)
    predicted_s = []
    for cohorts in (1, 2):
        pipeline = open_pipeline(
            llama, devices__devices="cpu=64MiB,cpu=64MiB", devices__layers="2,2", devices__placement="profiled",
            engine__cohorts=cohorts,
        )  # fmt: skip
        answers(pipeline)
        stages = shown(pipeline)["stages"]
        predicted_s.append(sum(stage["predicted_seconds"] for stage in stages) / stages[0]["forwards"])
    assert predicted_s[1] > 100 * predicted_s[0]


def test_status_has_what_each_link_achieved(llama: Path, open_pipeline: OpenPipeline) -> None:
    pipeline = open_pipeline(llama, devices__devices=THREE)
    answers(pipeline)
    transfers = shown(pipeline)["transfers"]
    assert {(entry["src"], entry["dst"]) for entry in transfers} == {("cpu#0", "cpu#1"), ("cpu#1", "cpu#2")}
    for entry in transfers:
        assert entry["bytes_per_second"] == pytest.approx(entry["bytes"] / entry["seconds"], rel=0.01)


def test_with_the_slow_device_first_order_is_part_of_the_placement(llama: Path, open_pipeline: OpenPipeline) -> None:
    vram = open_pipeline(llama, devices__devices=SLOW_AND_FAST, devices__placement="vram")
    assert [stage.device_name for stage in vram.engine.plan.placement.stages] == ["sim#0", "sim#1"]


def test_devices_are_filled_to_the_byte_and_no_further(llama: Path, open_pipeline: OpenPipeline) -> None:
    roomy = open_pipeline(
        llama, devices__devices=THREE, devices__layers="2,1,1", engine__kv_cache_tokens=64, engine__block_size=4
    )
    exact = ",".join(f"cpu={s.limit_bytes - s.free_bytes}B" for s in roomy.engine.plan.placement.stages)
    tight = open_pipeline(
        llama, devices__devices=exact, devices__layers="2,1,1", engine__kv_cache_tokens=64, engine__block_size=4
    )
    assert all(stage.free_bytes == 0 for stage in tight.engine.plan.placement.stages)
    answers(tight, replace(GREEDY, max_tokens=20))
    for stage in tight.engine.stages:
        budget = tight.engine.budgets[stage.device.name]
        budget.check_invariants()
        assert budget.used_bytes == budget.device.memory_limit_bytes
        assert stage.kv is not None
        pages = [page for layer in range(stage.part.first, stage.part.last) for page in stage.kv.layer(layer)]
        assert sum(page.nbytes for page in pages) == stage.kv.nbytes
    assert tight.engine.batcher.stats.preemptions > 0
    fewer = ",".join(f"cpu={s.limit_bytes - s.free_bytes - 1}B" for s in roomy.engine.plan.placement.stages)
    with pytest.raises(InsufficientMemoryError):
        open_pipeline(
            llama, devices__devices=fewer, devices__layers="2,1,1", engine__kv_cache_tokens=64, engine__block_size=4,
            model__max_model_len=64,
        )  # fmt: skip


def test_memory_taken_since_the_plan_is_noticed(
    llama: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Device, ...]] = []
    check = builder.check_memory

    def taken_once(plan: ModelPlan) -> None:
        calls.append(plan.devices)
        with monkeypatch.context() as taken:
            if len(calls) == 1:
                taken.setattr(builder, "free_bytes_of", lambda device: 10)
            check(plan)

    monkeypatch.setattr(keeper, "check_memory", taken_once)
    with pytest.raises(InsufficientMemoryError, match="other programs have taken memory"):
        open_pipeline(llama, devices__devices=THREE)
    calls.clear()
    pipeline = open_pipeline(llama, devices__devices=None, engine__kv_cache_tokens=256)
    assert len(calls) == 2, "limits that were not given are measured and planned with again"
    assert answers(pipeline) == answers(open_pipeline(llama))


def test_what_there_is_not_is_refused(llama: Path, open_pipeline: OpenPipeline) -> None:
    with pytest.raises(InvalidRequestError, match="balanced"):
        open_pipeline(llama, devices__devices=THREE, devices__placement="best")
    with pytest.raises(InvalidRequestError, match="layers"):
        open_pipeline(llama, devices__devices=THREE, devices__layers="3,3")
