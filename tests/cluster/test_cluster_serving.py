"""A model over a master and workers: placed, loaded, served with the same tokens, moved, and what a loss does to it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from cluster.machines import WorkerProcess, WorkerThread, joined
from plain_settings import CACHE_DIR, make_settings
from steering import LONGEST_WAIT_S, until

from core.cluster import session
from core.cluster.hosted_stage import HostedStage
from core.cluster.master import Master
from core.errors import DeviceError, DeviceLostError, UnavailableError
from core.inference_pipeline import InferencePipeline
from core.request import SamplingParams

PROMPT = [5, 17, 3, 90, 42, 8, 8, 61, 7]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=24, temperature=0.8, seed=11, ignore_eos=True)


def tokens(pipeline: InferencePipeline) -> list[list[int]]:
    handles = [pipeline.submit(PROMPT, params) for params in (GREEDY, SEEDED)]
    return [list(handle.result().completions[0].token_ids) for handle in handles]


@pytest.fixture(scope="module")
def alone(tiny_llama: Path) -> list[list[int]]:
    """What one machine says."""
    pipeline = InferencePipeline(
        make_settings(
            model__name=str(tiny_llama),
            devices__devices="cpu=64MiB",
            devices__profile_seconds=0.02,
            runtime__cache_dir=CACHE_DIR,
        )
    )
    try:
        pipeline.load()
        return tokens(pipeline)
    finally:
        pipeline.shutdown()


def homes(pipeline: InferencePipeline) -> list[str]:
    return [stage.device_name for stage in pipeline.engine.plan.placement.stages]


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ("cpu=64MiB,desk/cpu", ["cpu", "desk/cpu"]),
        ("desk/cpu,cpu=64MiB,attic/cpu", ["cpu", "desk/cpu", "attic/cpu"]),
        ("desk/cpu,attic/cpu", ["desk/cpu", "attic/cpu"]),
        ("attic/cpu=32MiB", ["attic/cpu"]),
    ],
)
def test_a_model_over_machines_says_the_same(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline], alone: list[list[int]],
    devices: str, expected: list[str],
) -> None:  # fmt: skip
    add_worker("desk")
    add_worker("attic")
    pipeline = serve(devices__devices=devices)
    assert homes(pipeline) == expected
    assert tokens(pipeline) == alone
    assert pipeline.infer(PROMPT).shape[0] == 1


@pytest.mark.parametrize("layers", ["1,3", "2,2", "3,1", "1,1,2", "1,2,1", "2,1,1"])
def test_every_cut_says_the_same(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline], alone: list[list[int]],
    layers: str,
) -> None:  # fmt: skip
    add_worker("desk")
    add_worker("attic")
    devices = ["desk/cpu", "cpu=64MiB", "attic/cpu"][: layers.count(",") + 1]
    pipeline = serve(devices__devices=",".join(devices), devices__layers=layers)
    assert [stage.num_layers for stage in pipeline.engine.plan.placement.stages] == [int(n) for n in layers.split(",")]
    assert tokens(pipeline) == alone


def test_parts_of_one_worker_are_devices_of_their_own(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline], alone: list[list[int]]
) -> None:
    add_worker("desk", "cpu=32MiB,cpu=32MiB")
    pipeline = serve(devices__devices="desk/cpu#0,desk/cpu#1")
    assert homes(pipeline) == ["desk/cpu#0", "desk/cpu#1"]
    assert tokens(pipeline) == alone


def test_a_worker_quantizes_its_layers_as_one_machine_does(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline],
    open_pipeline: Callable[..., InferencePipeline], alone: list[list[int]], tiny_llama: Path,
) -> None:  # fmt: skip
    quantized = {"model__quantize": "int4", "model__quantize_group": 32}
    expected = tokens(open_pipeline(tiny_llama, **quantized))
    add_worker("desk")
    pipeline = serve(devices__devices="cpu=64MiB,desk/cpu", **quantized)
    assert homes(pipeline) == ["cpu", "desk/cpu"]
    assert tokens(pipeline) == expected != alone


def test_what_is_measured_places_the_model(
    master: Master, add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline],
    alone: list[list[int]],
) -> None:  # fmt: skip
    add_worker("desk")
    (node,) = master.nodes
    assert 0 < node.speed.latency_s < 1
    pipeline = serve(devices__placement="profiled", devices__devices="cpu=64MiB,desk/cpu")
    profiles = {device.name: device.profile for device in pipeline.engine.plan.problem.devices}
    assert profiles["desk/cpu"].source == "measured" and profiles["desk/cpu"].bandwidth_bytes_s > 1e6
    link = pipeline.engine.plan.problem.links.link("cpu", "desk/cpu")
    assert (link.method, link.latency_s) == ("vtp", node.speed.latency_s)
    assert tokens(pipeline) == alone


def test_a_running_model_moves_to_a_machine_that_joins_and_back(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline], alone: list[list[int]]
) -> None:
    pipeline = serve(devices__devices="cpu=64MiB")
    add_worker("desk")
    for devices in ("cpu=64MiB,desk/cpu", "desk/cpu", "cpu=64MiB"):
        handle = pipeline.submit(PROMPT, GREEDY)
        moved = pipeline.place(devices=devices)
        assert [stage.device for stage in moved.stages] == devices.replace("=64MiB", "").split(",")
        assert list(handle.result().completions[0].token_ids) == alone[0]
        assert tokens(pipeline) == alone


def test_a_worker_that_is_killed_changes_no_token(
    master: Master, serve: Callable[..., InferencePipeline], alone: list[list[int]]
) -> None:
    worker = WorkerProcess(master, CACHE_DIR, "desk", "cpu=64MiB")
    try:
        joined(master, 1)
        pipeline = serve(devices__devices="cpu=64MiB,desk/cpu")
        long = SamplingParams(max_tokens=400, temperature=0.8, seed=11, ignore_eos=True)
        handles = [pipeline.submit(PROMPT, long), pipeline.submit(PROMPT, GREEDY)]
        until(lambda: pipeline.engine.batcher.stats.running == 2, "both run")
        worker.process.kill()
        found = [list(handle.result().completions[0].token_ids) for handle in handles]
        until(lambda: homes(pipeline) == ["cpu"], "the survivor has all layers")
        assert found[1] == alone[0]
        assert found[0] == list(pipeline.submit(PROMPT, long).result().completions[0].token_ids)
        assert not master.nodes
    finally:
        worker.close()


@pytest.mark.parametrize("cohorts", [1, 2])
def test_a_step_that_was_lost_on_its_way_is_not_waited_for(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline], alone: list[list[int]],
    monkeypatch: pytest.MonkeyPatch, cohorts: int,
) -> None:  # fmt: skip
    """The node that had it is gone, and the one behind it has never heard of it."""
    workers = {f"{name}/cpu": add_worker(name) for name in ("desk", "attic")}
    pipeline = serve(devices__devices="cpu=64MiB,desk/cpu,attic/cpu", devices__layers="1,2,1", engine__cohorts=cohorts)
    middle = homes(pipeline)[1]
    swallowed = threading.Event()
    arrive = HostedStage.arrive

    def swallow(self: HostedStage, step: int, what: object) -> None:
        if self._called == middle and swallowed.is_set() is False and step > 8:
            swallowed.set()
        if not (swallowed.is_set() and self._called == middle):
            arrive(self, step, what)  # type: ignore[arg-type]

    monkeypatch.setattr(HostedStage, "arrive", swallow)
    handles = [pipeline.submit(PROMPT, params) for params in (GREEDY, SEEDED)]
    assert swallowed.wait(LONGEST_WAIT_S)
    workers[middle].close()
    assert [list(handle.result().completions[0].token_ids) for handle in handles] == alone
    assert middle not in homes(pipeline)


def test_what_a_new_epoch_makes_stale_is_not_waited_for(
    master: Master, add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline],
    alone: list[list[int]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A device fails while steps are on their way behind it: their results are of the old epoch when they come."""
    for name in ("desk", "attic"):
        add_worker(name)
    pipeline = serve(devices__devices="cpu=64MiB,desk/cpu,attic/cpu", devices__layers="1,2,1", engine__cohorts=2)
    _, middle, last = homes(pipeline)
    held, go_on = threading.Event(), threading.Event()
    arrive = HostedStage.arrive

    def hold(self: HostedStage, step: int, what: object) -> None:
        if self._called == last and step > 8 and not go_on.is_set():
            held.set()
            assert go_on.wait(LONGEST_WAIT_S)
        arrive(self, step, what)  # type: ignore[arg-type]

    monkeypatch.setattr(HostedStage, "arrive", hold)
    handles = [pipeline.submit(PROMPT, params) for params in (GREEDY, SEEDED)]
    assert held.wait(LONGEST_WAIT_S)
    pipeline._keeper.recovery.device_lost(DeviceLostError("no answer", device=middle))
    until(lambda: master._epoch == 1 and all(node.data.epoch == 1 for node in master.nodes), "all know")
    go_on.set()
    assert [list(handle.result().completions[0].token_ids) for handle in handles] == alone
    assert homes(pipeline) != ["cpu", middle, last]


def test_a_way_between_workers_that_is_gone_is_noticed(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline], alone: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Both ends are well, and the master reaches both."""
    monkeypatch.setattr(session, "UNHEARD_S", 0.2)
    workers = {f"{name}/cpu": add_worker(name) for name in ("desk", "attic")}
    pipeline = serve(devices__devices="desk/cpu,attic/cpu")
    first, second = homes(pipeline)
    begun = workers[first].worker._session
    assert begun is not None
    ((link, _),) = begun._out.values()
    handles = [pipeline.submit(PROMPT, params) for params in (GREEDY, SEEDED)]
    until(lambda: pipeline.engine.batcher.stats.total_tokens > 4, "they run")
    link._socket.shutdown(socket.SHUT_RDWR)
    assert [list(handle.result().completions[0].token_ids) for handle in handles] == alone
    until(lambda: begun.ended.is_set() or homes(pipeline) != [first, second], "the node has gone, or the model")


def test_where_nothing_can_hold_the_model_requests_wait_for_the_node(
    master: Master, add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline],
    alone: list[list[int]],
) -> None:  # fmt: skip
    first = add_worker("desk")
    pipeline = serve(devices__devices="desk/cpu")
    long = SamplingParams(max_tokens=400, temperature=0.8, seed=11, ignore_eos=True)
    expected = list(pipeline.submit(PROMPT, long).result().completions[0].token_ids)
    handle = pipeline.submit(PROMPT, long)
    until(lambda: pipeline.engine.batcher.stats.running == 1, "it runs")
    first.close()
    until(lambda: not pipeline.ready()[0], "the loss")
    assert "does not fit without desk/cpu" in pipeline.ready()[1]
    with pytest.raises(UnavailableError, match="does not fit without desk/cpu") as refused:
        pipeline.submit(PROMPT, GREEDY)
    assert refused.value.retry_after_s == 10.0
    add_worker("desk")
    assert list(handle.result().completions[0].token_ids) == expected
    until(lambda: pipeline.ready()[0], "service again")
    assert tokens(pipeline) == alone


def test_they_wait_as_well_if_the_node_goes_while_the_model_is_moved_to_it(
    master: Master, add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline],
    alone: list[list[int]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A step may fail before the node is known to be gone: the node is tried once more, and fails again."""
    add_worker("desk")
    pipeline = serve(devices__devices="desk/cpu")
    gone = Mock(side_effect=DeviceLostError("no answer", device="desk/cpu"))
    monkeypatch.setattr(pipeline._keeper.recovery, "_relocate", gone)
    monkeypatch.setattr(pipeline.engine.stages[0], "results", gone)
    handle = pipeline.submit(PROMPT, GREEDY)
    until(lambda: "cannot run without desk/cpu" in pipeline.ready()[1], "it waits")
    assert [node.name for node in master.nodes] == ["desk"]
    monkeypatch.undo()
    add_worker("attic")
    assert list(handle.result().completions[0].token_ids) == alone[0]


def test_they_do_not_wait_for_ever(
    master: Master, add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline],
    alone: list[list[int]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(Master, "wait_s", 0.2)
    first = add_worker("desk")
    pipeline = serve(devices__devices="desk/cpu")
    handle = pipeline.submit(PROMPT, SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True))
    until(lambda: pipeline.engine.batcher.stats.running == 1, "it runs")
    first.close()
    with pytest.raises(DeviceLostError):
        handle.result()
    assert not pipeline.ready()[0], "new ones are refused as before"
    add_worker("attic")
    until(lambda: pipeline.ready()[0], "another node will do")
    assert homes(pipeline) == ["attic/cpu"]
    assert tokens(pipeline) == alone


def test_a_node_that_is_lost_while_nothing_runs_is_left(
    master: Master,
    add_worker: Callable[..., WorkerThread],
    serve: Callable[..., InferencePipeline],
    alone: list[list[int]],
) -> None:
    first = add_worker("desk")
    pipeline = serve(devices__devices="cpu=64MiB,desk/cpu")
    add_worker("attic")
    first.close()
    until(lambda: homes(pipeline) == ["cpu"], "the survivor has all layers")
    (attic,) = master.nodes
    assert attic.data.epoch == 1, "what was on its way to others is of no use to them"
    assert tokens(pipeline) == alone


def test_devices_that_are_not_there_are_refused(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline]
) -> None:
    add_worker("desk", "cpu=64MiB")
    for devices, reason in (
        ("desk/cuda:0", "desk/cuda:0 is not in the cluster; of other machines there are: desk/cpu."),
        ("desk/cpu=1GiB", "desk/cpu offers 64 MiB, less than the 1 GiB asked for"),
        ("desk/cpu,desk/cpu", "named twice"),
        ("desk/cpu=much", "'much' is not a size"),
    ):
        with pytest.raises(DeviceError, match=reason):
            serve(devices__devices=devices)
