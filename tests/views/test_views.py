"""Views of real engines: what they add up to, what they cost, and that an engine that goes does not break them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Any

import pytest
from engine.lending_cases import open_tight
from steering import LONGEST_WAIT_S, arriving_together, with_each_step
from tiny_models import build_tiny

from core.api import create_app
from core.engine import model_engine
from core.inference_pipeline import InferencePipeline
from core.request import SamplingParams
from core.views.devices import device_views
from core.views.health import health
from core.views.memory import memory_view
from core.views.metrics import engine_metrics
from core.views.render import render
from core.views.status import (
    NoModelView,
    PipelineView,
    RequestView,
    batcher_view,
    pipeline_view,
    queue_view,
)

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, detokenize=False)
TOKEN = "a-token-for-tests"
OpenPipeline = Callable[..., InferencePipeline]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    build_tiny("llama", path)
    return path


@dataclass(frozen=True)
class _Part:
    kind: str
    to: str | None


@dataclass(frozen=True)
class _Record:
    name: str
    parts: tuple[Any, ...]
    rates: dict[int, float]


def test_records_become_plain_json() -> None:
    record = _Record("a", (_Part("demotion", None), None, 1.5), {8: 2.0})
    assert render(record) == {
        "name": "a",
        "parts": [{"kind": "demotion", "to": None}, None, 1.5],
        "rates": {"8": 2.0},
    }


def test_views_without_a_model_are_whole(llama: Path, open_pipeline: OpenPipeline) -> None:
    pipeline = open_pipeline(llama)
    pipeline.unload()
    engine, service = pipeline.current_engine, pipeline.state()
    assert isinstance(pipeline_view(engine, service), NoModelView)
    assert render(pipeline_view(engine, service)) | {"subsystems": {}} == {
        "ready": False, "state": "no model is loaded", "subsystems": {}, "model": None, "stages": []
    }  # fmt: skip
    assert health(engine, service).failed == ["engine", "model"]
    assert queue_view(engine, service).limit == pipeline.settings.engine.max_queue
    assert batcher_view(engine, service).max_batch_size == pipeline.settings.engine.max_batch_size
    assert render(memory_view(engine)) == {
        "devices": [], "kv_blocks": None, "stages": [], "leases": [], "decisions": {}, "tiers": [],
        "tier_troubles": {},
    }  # fmt: skip
    assert device_views(engine, service) == ()


def test_a_server_that_shuts_down_says_so(llama: Path, open_pipeline: OpenPipeline) -> None:
    pipeline = open_pipeline(llama)
    assert pipeline.ready() == (True, "ready")
    pipeline.shutdown()
    assert pipeline.ready() == (False, "the server is shutting down")
    report = health(pipeline.current_engine, pipeline.state())
    assert report.checks["engine"].detail == report.checks["model"].detail == "the server is shutting down"


def test_the_queue_names_what_is_not_finished_and_since_when(
    llama: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = open_pipeline(llama, engine__max_batch_size=1)
    looks: list[tuple[RequestView, ...]] = []

    def look() -> None:
        looks.append(queue_view(pipeline.engine, pipeline.state()).requests)

    with with_each_step(pipeline, look):
        with arriving_together(pipeline):
            handles = [pipeline.submit([3, 4, 5], GREEDY, request_id=name) for name in ("first", "second")]
        for handle in handles:
            handle.result(LONGEST_WAIT_S)
    first, second = looks[0]
    assert (first.id, first.state, first.prompt_tokens, first.generated_tokens) == ("first", "running", 3, 0)
    assert (second.id, second.state, second.generated_tokens) == ("second", "waiting", 0)
    assert first.age_seconds >= second.age_seconds >= 0
    assert looks[1][0].generated_tokens == 1
    assert looks[1][0].age_seconds > first.age_seconds
    assert [(each.id, each.state) for each in looks[-1]] == [("second", "running")]
    with arriving_together(pipeline):
        handles = [pipeline.submit([3], GREEDY, request_id=name) for name in ("third", "fourth")]
        monkeypatch.setattr("core.views.status.MAX_REQUESTS_SHOWN", 1)
        look()
    assert [each.id for each in looks[-1]] == ["third"]
    for handle in handles:
        handle.result(LONGEST_WAIT_S)


def test_an_engine_that_was_freed_can_still_be_looked_at(
    llama: Path, open_pipeline: OpenPipeline, tmp_path: Path
) -> None:
    """A swap may free the engine between the moment it is asked for and the moment it is read."""
    tiers = {"memory__host_bytes": 1 << 20, "memory__disk_path": tmp_path / "kv", "memory__disk_min_free_bytes": 0}
    pipeline = open_tight(open_pipeline, llama, [64, 640], memory__disk_bytes=1 << 24, **tiers)
    pipeline.submit(list(range(3, 63)), GREEDY).result(LONGEST_WAIT_S)
    engine, service = pipeline.engine, pipeline.state()
    before = pipeline_view(engine, service)
    assert isinstance(before, PipelineView)
    caches = [stage.kv for stage in engine.stages]
    assert [stage.kv_bytes for stage in before.stages] == [kv.nbytes for kv in caches if kv is not None]
    assert all(stage.kv_bytes for stage in before.stages)
    assert before.memory.leases
    with pytest.raises(FrozenInstanceError):
        before.stages[0].kv_bytes = 0  # type: ignore[misc]
    pipeline.unload()
    after = pipeline_view(engine, service)
    assert isinstance(after, PipelineView)
    assert after.stages == before.stages
    assert memory_view(engine, 3).kv_blocks == before.memory.kv_blocks
    assert {metric.name for metric in engine_metrics(engine, {})} >= {"vramancer_stage_forwards"}


def test_polling_never_fails_while_models_come_and_go(llama: Path, open_pipeline: OpenPipeline, tmp_path: Path) -> None:
    pipeline = open_pipeline(
        llama, devices__devices="cpu=64MiB,cpu=64MiB", devices__layers="2,2", memory__host_bytes=1 << 20,
        memory__disk_path=tmp_path / "kv", memory__disk_bytes=1 << 24, memory__disk_min_free_bytes=0, api__token=TOKEN,
    )  # fmt: skip
    client = create_app(pipeline).test_client()
    paths = ("pipeline/status", "memory?blocks=3", "queue/status", "batcher/stats", "gpu", "models")
    statuses: Counter[int] = Counter()
    stages: Counter[int] = Counter()
    done = threading.Event()

    def poll() -> None:
        while not done.is_set():
            for path in (*(f"/api/{path}" for path in paths), "/metrics"):
                response = client.get(path, headers={"X-API-TOKEN": TOKEN})
                statuses[response.status_code] += 1
                if path == "/api/pipeline/status":
                    stages[len(response.get_json()["stages"])] += 1

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        for _ in range(3):
            pipeline.submit([5, 6, 7], GREEDY).result(LONGEST_WAIT_S)
            pipeline.unload()
            pipeline.load()
    finally:
        done.set()
        thread.join()
    assert set(statuses) == {200}
    assert set(stages) <= {0, 2}
    assert stages[2] or stages[0]


def test_polling_asks_the_cost_model_once_for_each_number_of_streams(
    llama: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = open_pipeline(llama, devices__devices="sim=64MiB@40MB/s/10GFLOPS", devices__placement="profiled")
    asked: list[int] = []
    predict_rate = model_engine.predict_rate

    def counted(plan: Any, request: Any, streams: int, context: int, pooled: Any) -> Any:
        asked.append(streams)
        return predict_rate(plan, request, streams, context, pooled)

    monkeypatch.setattr(model_engine, "predict_rate", counted)
    handle = pipeline.submit([5, 6, 7], SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True))
    shown = []
    while len(shown) < 3:
        view = pipeline_view(pipeline.current_engine, pipeline.state())
        assert isinstance(view, PipelineView)
        assert view.prediction is not None
        if view.prediction.now["streams"] == 1:
            shown.append(view.prediction.now["predicted"])
    handle.abort()
    assert asked == [1]
    (known,) = [rate for streams, rate in view.prediction.tokens_per_second.items() if streams == 1]
    assert shown == [known] * 3


def test_percentiles_are_computed_where_they_are_shown_alone(
    open_pipeline: OpenPipeline, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They sort thousands of numbers, in time that the engine would have."""
    pipeline, asked = open_pipeline(llama), []
    latency = pipeline.metrics.latency
    monkeypatch.setattr(pipeline.metrics, "latency", lambda: asked.append(1) or latency())
    for view in (pipeline_view, queue_view, device_views, health):
        view(pipeline.current_engine, pipeline.state())  # type: ignore[operator]
    assert not asked
    assert set(batcher_view(pipeline.current_engine, pipeline.state()).latency) == set(latency())
    assert asked
