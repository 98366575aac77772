"""KV that goes with a model from machine to machine."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cluster.machines import WorkerThread
from steering import until

from core.cluster.master import Master
from core.cluster.messages import CopyPages, ReadPages, WritePages
from core.cluster.placed_stage import PlacedRemoteStage
from core.engine.carrying import Carrier, ways_between
from core.errors import InvalidRequestError
from core.inference_pipeline import InferencePipeline
from core.request import SamplingParams

PROMPT = [3 + (at * 7 + at * at) % 90 for at in range(150)]
LONG = SamplingParams(max_tokens=300, temperature=0.8, seed=5, ignore_eos=True)


@pytest.fixture
def nodes(add_worker: Callable[..., WorkerThread]) -> None:
    add_worker("desk", "cpu=64MiB,cpu=64MiB")
    add_worker("attic")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("cpu=64MiB", "cpu=64MiB,desk/cpu#0"),
        ("cpu=64MiB,desk/cpu#0", "cpu=64MiB"),
        ("desk/cpu#0,cpu=64MiB", "desk/cpu#0,desk/cpu#1"),
        ("desk/cpu#0,attic/cpu", "attic/cpu,desk/cpu#1"),
    ],
)
@pytest.mark.usefixtures("nodes")
def test_it_goes_along(
    serve: Callable[..., InferencePipeline], monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    monkeypatch.setattr(Carrier, "_is_quicker", lambda self, blocks: True)  # where machines are one, computing is
    pipeline = serve(devices__devices=before)
    expected = pipeline.submit(PROMPT, LONG).result().completions[0].token_ids
    pipeline.engine.batcher.call(pipeline.engine.kv.forget_cached).result()
    handle = pipeline.submit(PROMPT, LONG)
    until(lambda: pipeline.engine.batcher.stats.total_tokens > LONG.max_tokens + 5, "it answers")
    moved = pipeline.place(devices=after, placement="balanced")
    assert moved.carried_kv_tokens is not None and moved.carried_kv_tokens >= len(PROMPT) // 16 * 16
    assert handle.result().completions[0].token_ids == expected


@pytest.mark.usefixtures("nodes")
def test_a_slow_network_is_left_alone(serve: Callable[..., InferencePipeline]) -> None:
    pipeline = serve(devices__devices="cpu=64MiB,desk/cpu#0")
    other = serve(devices__devices="attic/cpu,cpu=64MiB")
    ways = ways_between(pipeline.engine.stages, other.engine.stages)
    assert any(not way.is_here for way in ways)
    for seconds, quicker in ((1e-9, False), (1e9, True), (None, True)):
        assert Carrier(pipeline.engine, other.engine, seconds)._is_quicker(100) is quicker


@pytest.mark.usefixtures("nodes")
def test_pages_that_are_not_there_are_refused(serve: Callable[..., InferencePipeline], master: Master) -> None:
    pipeline = serve(devices__devices="cpu=64MiB,desk/cpu#0")
    stage = pipeline.engine.stages[1]
    assert isinstance(stage, PlacedRemoteStage) and stage.kv is not None
    layer, page = stage.part.first, stage.kv.num_pages
    row = stage.kv.layer_bytes[layer]
    for wrong in (
        ReadPages(stage.number, (layer,), (page,)),
        ReadPages(stage.number, (layer - 1,), (0,)),
        WritePages(stage.number, (layer,), (0,), bytes(row - 1)),
        CopyPages(stage.number, stage.number, (layer,), (0, 1), (2,)),
    ):
        with pytest.raises(InvalidRequestError):
            stage.node.call(wrong)
    data = stage.read_pages([1], [layer])
    stage.write_pages([2], data + 1, [layer])
    stage.copy_pages([2], stage, [3], [layer])
    assert (stage.read_pages([3], [layer]) == data + 1).all()
