"""A model larger than the devices of two machines: layers of a stage on a worker stay in that machine's main memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster.machines import WorkerThread
from steering import LONGEST_WAIT_S, until, with_each_step
from streamed_models import ENGINE, LAYERS, build_deep, half_of_it

from core.cluster.node import Node
from core.devices import host_device
from core.errors import InsufficientMemoryError, OutOfDeviceMemoryError
from core.inference_pipeline import InferencePipeline
from core.request import SamplingParams
from core.streaming.stream import StreamManager
from core.views.render import render
from core.views.status import pipeline_view

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, detokenize=False)
PROMPT = [5, 6, 7, 8, 9]

Serve = Callable[..., InferencePipeline]
AddWorker = Callable[..., WorkerThread]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A model of many layers, and what `generate()` says."""
    path = tmp_path_factory.mktemp("deep")
    model = build_deep("llama", path)
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    return path, [int(token) for token in out[0, len(PROMPT) :]]


@pytest.fixture
def started() -> list[WorkerThread]:
    """Workers of this test."""
    return []


@pytest.fixture
def over_two(
    serve: Serve, add_worker: AddWorker, deep: tuple[Path, list[int]], started: list[WorkerThread]
) -> Callable[..., InferencePipeline]:
    """Each machine has room for a quarter of the weights."""

    def start(**options: Any) -> InferencePipeline:
        here, there = half_of_it(deep[0], 2).split(",")
        started.append(add_worker("desk", there))
        return serve(model__name=str(deep[0]), devices__devices=f"{here},desk/cpu", **ENGINE, **options)

    return start


def tokens(pipeline: InferencePipeline) -> list[int]:
    return list(pipeline.submit(PROMPT, GREEDY).result(LONGEST_WAIT_S).completions[0].token_ids)


def test_layers_stream_in_where_they_are_computed(
    over_two: Callable[..., InferencePipeline], deep: tuple[Path, list[int]], started: list[WorkerThread]
) -> None:
    pipeline = over_two(engine__cohorts=2)
    engine, (here, there) = pipeline.engine, pipeline.engine.plan.placement.stages
    assert (here.device_name, there.device_name) == ("cpu", "desk/cpu")
    assert here.streamed_layers and there.streamed_layers
    assert tokens(pipeline) == deep[1]

    session = started[0].worker._session
    assert session is not None
    used, main = session._host.used_by_purpose()["cpu"], session._host._main
    assert sum(used.values()) <= there.limit_bytes < engine.plan.costs.weight_bytes(there.first_layer, there.last_layer)
    assert used[StreamManager.PURPOSE] == 2 * there.slot_bytes
    assert main.used_by_purpose()[StreamManager.HOST_PURPOSE] == there.streamed_bytes
    assert engine.budgets["desk/host"].used_by_purpose() == {StreamManager.HOST_PURPOSE: there.streamed_bytes}
    assert engine.budgets["host"].used_by_purpose()[StreamManager.HOST_PURPOSE] == here.streamed_bytes

    until(lambda: engine.stages[1].report().stream_wait_s > 0, "the worker has said that it waited for layers")
    stage = render(pipeline_view(pipeline.current_engine, pipeline.state()))["stages"][1]
    assert stage["streamed_layers"] == list(there.streamed_layers)
    assert stage["stream_wait_seconds"] >= 0
    pipeline.unload()
    assert session._host.used_by_purpose()["cpu"] == {}
    assert StreamManager.HOST_PURPOSE not in main.used_by_purpose()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("vrm-stream")]


def test_a_worker_that_is_lost_changes_no_token(
    over_two: Callable[..., InferencePipeline], deep: tuple[Path, list[int]], started: list[WorkerThread]
) -> None:
    pipeline, lost = over_two(), threading.Event()

    def lose() -> None:
        if pipeline.engine.batcher.stats.total_tokens > 2 and not lost.is_set():
            lost.set()
            started[0].worker.stop()

    with with_each_step(pipeline, lose):
        assert tokens(pipeline) == deep[1]
    assert lost.is_set()
    (stage,) = pipeline.engine.plan.placement.stages
    assert stage.device_name == "cpu" and len(stage.streamed_layers) > LAYERS // 2, "the survivor streams more"
    assert tokens(pipeline) == deep[1]


def test_what_may_not_stream_or_has_no_main_memory_is_refused(
    over_two: Callable[..., InferencePipeline], serve: Serve, deep: tuple[Path, list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    here = half_of_it(deep[0], 2).split(",")[0]
    with pytest.raises(InsufficientMemoryError, match="stream-weights auto"):
        over_two(devices__stream_weights="off")
    small = property(lambda node: host_device(1000, node.name))
    monkeypatch.setattr(Node, "host", small)
    with pytest.raises(InsufficientMemoryError, match="desk/host lacks") as caught:
        serve(
            model__name=str(deep[0]), devices__devices=f"{here},desk/cpu", devices__layers="4,20", **ENGINE,
        )  # fmt: skip
    assert caught.value.lacking_bytes["desk/host"] > 0


def test_a_worker_whose_main_memory_has_gone_refuses_and_keeps_nothing(
    add_worker: AddWorker, serve: Serve, deep: tuple[Path, list[int]]
) -> None:
    here, there = half_of_it(deep[0], 2).split(",")
    worker = add_worker("desk", there).worker
    main, session = worker._main_memory, worker._session
    main.reserve("others", main.free_bytes - 1000)
    with pytest.raises(OutOfDeviceMemoryError, match="desk: host: streamed_weights needs"):
        serve(model__name=str(deep[0]), devices__devices=f"{here},desk/cpu", **ENGINE)
    assert session is not None and session._host.used_by_purpose()["cpu"] == {}
    assert main.free_bytes == 1000
