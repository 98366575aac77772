"""A model is swapped, unloaded or shut down while others load, cancel and submit: nothing runs on unseen, and whoever
comes at the wrong moment is told why."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from plain_settings import make_settings
from safetensors import safe_open
from tiny_models import build_tiny

from core import inference_pipeline
from core.batching.batcher import ContinuousBatcher
from core.engine.model_engine import ModelEngine
from core.errors import ConflictError, EngineDeadError, ModelChangedError, ModelNotLoadedError, UnavailableError
from core.inference_pipeline import InferencePipeline
from core.models.resolve import DEMO_NAME
from core.request import SamplingParams

OpenPipeline = Callable[..., InferencePipeline]
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, detokenize=False)
WAIT_S = 60.0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    build_tiny("llama", path)
    return path


def engine_threads() -> int:
    return sum(thread.name == "vrm-engine" for thread in threading.enumerate())


class LockAfter:
    """A lock that lets something happen just before it is taken for the first time."""

    def __init__(self, before: Callable[[], object]) -> None:
        self._lock = threading.Lock()
        self._before: Callable[[], object] | None = before

    def acquire(self, *, blocking: bool = True) -> bool:
        before, self._before = self._before, None
        if before is not None:
            before()
        return self._lock.acquire(blocking=blocking)

    def release(self) -> None:
        self._lock.release()

    def locked(self) -> bool:
        return self._lock.locked()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def held(pipeline: InferencePipeline) -> threading.Event:
    """The engine thread waits until this is set, and with it all requests."""
    begun, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        assert go_on.wait(WAIT_S)

    pipeline.engine.batcher.call(wait)
    assert begun.wait(WAIT_S)
    return go_on


def at_stop(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Something happens when the next engine is told to stop."""
    stop, done = ContinuousBatcher.stop, []

    def acting(self: ContinuousBatcher, **options: Any) -> None:
        if not done:
            done.append(True)
            action()
        stop(self, **options)

    monkeypatch.setattr(ContinuousBatcher, "stop", acting)


def test_an_unload_ends_the_engine_that_runs_then(
    tiny: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A swap that comes between looking at the engine and the lock used to leave one that nobody could reach."""
    before = engine_threads()
    pipeline = open_pipeline(tiny)
    monkeypatch.setattr(pipeline._keeper, "_lock", LockAfter(lambda: pipeline.load(DEMO_NAME)))
    assert pipeline.unload().name == DEMO_NAME
    assert engine_threads() == before
    with pytest.raises(ModelNotLoadedError, match="No model is loaded"):
        pipeline.unload()


def test_one_change_at_a_time(tiny: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = open_pipeline(tiny)
    refused: list[Exception] = []

    def change_too() -> None:
        for change in (pipeline.load, pipeline.unload):
            with pytest.raises(ConflictError) as caught:
                change()
            refused.append(caught.value)

    at_stop(monkeypatch, change_too)
    pipeline.load(DEMO_NAME)
    assert len(refused) == 2
    assert pipeline.model.name == DEMO_NAME


def test_a_request_of_a_leaving_engine_can_be_cancelled(
    tiny: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = open_pipeline(tiny)
    go_on = held(pipeline)
    handle = pipeline.submit(
        [5, 6], SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True), request_id="mine"
    )
    cancelled: list[bool] = []

    def cancel() -> None:
        assert pipeline.model.name == DEMO_NAME
        cancelled.append(pipeline.cancel("mine"))
        go_on.set()

    at_stop(monkeypatch, cancel)
    pipeline.load(DEMO_NAME)
    assert cancelled == [True]
    assert handle.result(WAIT_S).completions[0].finish_reason == "abort"
    assert not pipeline.cancel("mine")


@pytest.mark.parametrize("room", ["cpu=64MiB", "cpu=25MiB"])
def test_who_comes_too_late_for_a_swapped_model_is_told_so(
    tiny: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch, room: str
) -> None:
    """Also where the old model has to make room first: then nothing is served for a while."""
    pipeline = open_pipeline(tiny, devices__devices=room)
    make = inference_pipeline.make_request
    swapped: list[bool] = []

    def swap_first(*args: Any, **options: Any) -> Any:
        if not swapped:
            swapped.append(True)
            pipeline.load(DEMO_NAME)
        return make(*args, **options)

    monkeypatch.setattr(inference_pipeline, "make_request", swap_first)
    with pytest.raises(ModelChangedError, match="try again") as caught:
        pipeline.submit([5, 6], GREEDY)
    assert caught.value.retry_after_s is not None
    assert pipeline.submit([5, 6], GREEDY).result(WAIT_S).completions[0].token_ids


@pytest.mark.parametrize("call", ["load", "unload", "shutdown"])
def test_a_request_that_outlasts_the_time_given_is_told_why_it_ends(
    tiny: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    pipeline = open_pipeline(tiny, api__drain_timeout_s=0)
    go_on = held(pipeline)
    handle = pipeline.submit([5, 6], GREEDY)
    monkeypatch.setattr(threading.Thread, "join", _then(go_on.set, threading.Thread.join))
    said: dict[str, tuple[type[UnavailableError], str]] = {
        "load": (ModelChangedError, "replaced"),
        "unload": (ModelNotLoadedError, "unloaded"),
        "shutdown": (EngineDeadError, "shutting down"),
    }
    change: Callable[[], object] = {
        "load": lambda: pipeline.load(DEMO_NAME), "unload": pipeline.unload, "shutdown": pipeline.shutdown,
    }[call]  # fmt: skip
    change()
    error, match = said[call]
    with pytest.raises(error, match=match) as caught:
        handle.result(WAIT_S)
    assert caught.value.retry_after_s is not None


def _then(first: Callable[[], object], call: Callable[..., Any]) -> Callable[..., Any]:
    def both(*args: Any, **options: Any) -> Any:
        first()
        return call(*args, **options)

    return both


def test_while_a_model_makes_room_the_next_one_is_said_to_come(
    tiny: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = open_pipeline(tiny, devices__devices="cpu=25MiB")
    said: list[str] = []

    def submit() -> None:
        with pytest.raises(ModelNotLoadedError) as caught:
            pipeline.submit([5, 6], GREEDY)
        said.append(caught.value.message)

    at_stop(monkeypatch, submit)
    pipeline.load(DEMO_NAME)
    assert said == ["A model is being loaded; try again in a moment."]


def test_when_the_old_model_does_not_come_back_either_both_reasons_are_told(
    tiny: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = engine_threads()
    pipeline = open_pipeline(tiny, devices__devices="cpu=25MiB")
    reasons = iter(["the new one is broken", "the old one is gone"])

    def fail(engine: object) -> None:
        raise RuntimeError(next(reasons))

    with monkeypatch.context() as broken:
        broken.setattr(pipeline._keeper, "_warm_up", fail)
        with pytest.raises(ModelNotLoadedError, match=r"the new one is broken.*the old one is gone"):
            pipeline.load(DEMO_NAME)
    assert engine_threads() == before
    assert pipeline.ready() == (False, "no model is loaded")
    pipeline.load(str(tiny))
    assert pipeline.submit([5, 6], GREEDY).result(WAIT_S).completions[0].token_ids


@pytest.mark.parametrize("room", ["cpu=64MiB", "cpu=25MiB"])
def test_a_model_that_serves_goes_on_when_its_tiers_cannot_be_opened(
    tiny: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch, room: str
) -> None:
    """It has started; the old one is not loaded again beside it."""
    before = engine_threads()
    pipeline = open_pipeline(tiny, devices__devices=room)

    def fail(engine: ModelEngine) -> None:
        raise RuntimeError("broken for a test")

    with monkeypatch.context() as broken:
        broken.setattr(ModelEngine, "open_lasting", fail)
        with pytest.raises(RuntimeError, match="broken for a test"):
            pipeline.load(DEMO_NAME)
    assert pipeline.model.name == DEMO_NAME
    assert engine_threads() == before + 1
    assert pipeline.submit([5, 6], GREEDY).result(WAIT_S).completions[0].token_ids


def test_a_shutdown_does_not_wait_for_the_rest_of_a_load(tiny: Path) -> None:
    (file,) = tiny.glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        num_tensors = len(list(tensors.keys()))
    read: queue.SimpleQueue[int] = queue.SimpleQueue()
    closing = threading.Event()
    settings = make_settings(model__name=str(tiny), devices__devices="cpu=64MiB")

    def progress(done: int, total: int) -> None:
        read.put(done)
        assert closing.wait(WAIT_S)

    pipeline = InferencePipeline(settings, on_progress=progress)
    with ThreadPoolExecutor(2) as threads:
        loading = threads.submit(pipeline.load)
        assert read.get(timeout=WAIT_S)
        ending = threads.submit(pipeline.shutdown)
        while not pipeline._keeper.closing:
            assert not ending.done()
        closing.set()
        with pytest.raises(EngineDeadError, match="shutting down"):
            loading.result(WAIT_S)
        ending.result(WAIT_S)
    assert read.qsize() < num_tensors - 1
    with pytest.raises(EngineDeadError, match="shutting down"):
        pipeline.load()
