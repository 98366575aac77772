"""What nodes that join are good for, and what becomes of the layers of one that wants to go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster.machines import WorkerThread
from plain_settings import CACHE_DIR, make_settings
from steering import until

from core.cluster.master import Master
from core.inference_pipeline import InferencePipeline
from core.request import SamplingParams
from core.views.nodes import nodes_view

PROMPT = [5, 17, 3, 90, 42, 8, 8, 61, 7]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=400, temperature=0.7, seed=3, ignore_eos=True)
SLOW, QUICK = "sim=64MiB@0.02GB/s/0.1TFLOPS", "sim=64MiB@2GB/s/5TFLOPS"


@pytest.fixture
def serve(master: Master, tiny_llama: Path) -> Iterator[Callable[..., InferencePipeline]]:
    opened: list[InferencePipeline] = []

    def start(**overrides: Any) -> InferencePipeline:
        defaults = {
            "model__name": str(tiny_llama), "devices__profile_seconds": 0.02, "runtime__cache_dir": CACHE_DIR,
            "engine__kv_cache_tokens": 2048,
        }  # fmt: skip
        pipeline = InferencePipeline(make_settings(**{**defaults, **overrides}), cluster=master)
        opened.append(pipeline)
        pipeline.load()
        return pipeline

    yield start
    for pipeline in opened:
        pipeline.shutdown()


def homes(pipeline: InferencePipeline) -> set[str]:
    return {stage.device_name for stage in pipeline.engine.plan.placement.stages}


def offer(pipeline: InferencePipeline) -> Any:
    return nodes_view(pipeline.current_engine, pipeline.state()).offer


def looks(pipeline: InferencePipeline) -> int:
    growth = pipeline._keeper.growth
    assert growth is not None
    return growth.looks


def looked(pipeline: InferencePipeline, before: int) -> None:
    """Wait until the change since then has been thought about."""
    until(lambda: looks(pipeline) > before, "the look")


def test_a_quick_node_that_joins_is_moved_onto(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline]
) -> None:
    pipeline = serve(devices__devices=SLOW, cluster__auto_place=True)
    before = list(pipeline.submit(PROMPT, GREEDY).result().completions[0].token_ids)
    assert homes(pipeline) == {"sim"}
    add_worker("desk", QUICK)
    until(lambda: "desk/sim" in homes(pipeline), "the model moves")
    assert list(pipeline.submit(PROMPT, GREEDY).result().completions[0].token_ids) == before
    until(lambda: offer(pipeline) is None, "there is nothing more to gain")


def test_without_auto_place_it_is_offered(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline]
) -> None:
    pipeline = serve(devices__devices=SLOW)
    desk = add_worker("desk", QUICK)
    until(lambda: offer(pipeline) is not None, "the offer")
    found = offer(pipeline)
    assert set(found.now) == set(found.tokens_per_second)
    assert found.gain > 1.05
    assert homes(pipeline) == {"sim"}, "nobody asked for it"
    desk.close()
    until(lambda: offer(pipeline) is None, "it has gone with the node")


def test_nodes_that_were_there_before_the_model_count_too(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline]
) -> None:
    add_worker("desk", QUICK)
    pipeline = serve(devices__devices=SLOW, cluster__auto_place=True)
    until(lambda: "desk/sim" in homes(pipeline), "the model moves")


def test_a_slow_node_is_left_alone(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline]
) -> None:
    pipeline = serve(devices__devices=QUICK, cluster__auto_place=True)
    until(lambda: looks(pipeline) == 1, "the look after the load")
    add_worker("desk", SLOW)
    looked(pipeline, 1)
    assert offer(pipeline) is None
    assert homes(pipeline) == {"sim"}


def test_nodes_that_were_chosen_by_hand_stay_the_choice(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline]
) -> None:
    add_worker("desk", SLOW)
    pipeline = serve(devices__devices="desk/sim", cluster__auto_place=True)
    until(lambda: looks(pipeline) >= 1, "the look after the load")
    before = looks(pipeline)
    add_worker("attic", QUICK)
    looked(pipeline, before)
    assert (homes(pipeline), offer(pipeline)) == ({"desk/sim"}, None)


def test_a_node_that_leaves_is_emptied_first(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline]
) -> None:
    desk = add_worker("desk", "cpu=64MiB")
    pipeline = serve(devices__devices="cpu=64MiB,desk/cpu", devices__placement="balanced")
    assert homes(pipeline) == {"cpu", "desk/cpu"}
    expected = list(pipeline.submit(PROMPT, LONG).result().completions[0].token_ids)
    handle = pipeline.submit(PROMPT, LONG)
    until(lambda: pipeline.engine.batcher.stats.running == 1, "it runs")
    desk.worker.leave()
    desk.join()
    assert desk.error is None
    assert homes(pipeline) == {"cpu"}
    assert list(handle.result().completions[0].token_ids) == expected, "no token has changed"
    assert desk.worker._session is None


def test_a_node_that_is_not_used_leaves_at_once(
    master: Master, add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline]
) -> None:
    desk = add_worker("desk", "cpu=64MiB")
    pipeline = serve(devices__devices="cpu=64MiB")
    desk.worker.leave()
    desk.join()
    until(lambda: not master.nodes, "it has gone")
    assert homes(pipeline) == {"cpu"}


def test_a_node_that_is_needed_stays_until_another_one_comes(
    master: Master, add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline]
) -> None:
    desk = add_worker("desk", "cpu=64MiB")
    pipeline = serve(devices__devices="desk/cpu")
    expected = list(pipeline.submit(PROMPT, GREEDY).result().completions[0].token_ids)
    desk.worker.leave()
    until(lambda: master.nodes[0].leaving, "it is heard")
    assert not master.devices(0), "it is offered to nobody"
    assert nodes_view(pipeline.current_engine, pipeline.state()).nodes[1].status == "leaving"
    assert list(pipeline.submit(PROMPT, GREEDY).result().completions[0].token_ids) == expected, "and it still computes"
    add_worker("attic", "cpu=64MiB")
    desk.join()
    assert homes(pipeline) == {"attic/cpu"}
    assert list(pipeline.submit(PROMPT, GREEDY).result().completions[0].token_ids) == expected


def test_what_is_shown_of_nodes(
    master: Master, add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline]
) -> None:
    add_worker("desk", "cpu=64MiB,sim=32MiB@2GB/s/5TFLOPS")
    pipeline = serve(devices__devices="cpu=64MiB,desk/cpu", devices__placement="balanced")
    view = nodes_view(pipeline.current_engine, pipeline.state())
    here, desk = view.nodes
    assert (here.hostname, here.roles, here.link) == ("master", ("api", "engine", "master"), None)
    assert (desk.hostname, desk.roles, desk.status, desk.version) == ("desk", ("worker",), "joined", "1.2.3")
    assert desk.link is not None and 0 < desk.link.latency_s < 1 and desk.link.bytes_per_second > 1e6
    by_name = {device.name: device for device in desk.devices}
    assert set(by_name) == {"desk/cpu", "desk/sim"}
    assert by_name["desk/cpu"].used_bytes > 0, "its weights and its KV"
    assert (by_name["desk/sim"].used_bytes, by_name["desk/sim"].limit_bytes) == (0, 32 << 20)
    assert set(desk.layers) | set(here.layers) == homes(pipeline)
    assert (view.discovery.address, view.discovery.port) == master.address


def test_after_a_move_of_its_own_the_next_machine_counts_too(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline]
) -> None:
    pipeline = serve(devices__devices=SLOW, cluster__auto_place=True)
    add_worker("desk", "sim=64MiB@0.1GB/s/0.5TFLOPS")
    until(lambda: "desk/sim" in homes(pipeline), "the first move")
    add_worker("attic", QUICK)
    until(lambda: "attic/sim" in homes(pipeline), "the second")


def test_a_real_device_is_measured_where_machines_may_join(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline]
) -> None:
    """Else an offer would compare what is measured with what is made up."""
    pipeline = serve(devices__devices="cpu=64MiB", cluster__accept=True)
    profile = pipeline.engine.plan.problem.devices[0].profile
    assert profile.source != "assumed"
    assert pipeline.engine.plan.prediction is not None


def test_a_drain_that_fails_leaves_the_model_where_it_is(
    master: Master, add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whatever it failed of; it is tried again."""
    monkeypatch.setattr("core.cluster.master._TOLD_EVERY_S", 0.2)
    desk = add_worker("desk", "cpu=64MiB")
    pipeline = serve(devices__devices="cpu=64MiB,desk/cpu", devices__placement="balanced")
    expected = list(pipeline.submit(PROMPT, GREEDY).result().completions[0].token_ids)
    relocate, failures = pipeline._keeper.recovery._relocate, []

    def failing(*given: Any) -> None:
        if len(failures) < 3:
            failures.append(given[-1])
            raise OSError("the disk is on fire")
        relocate(*given)

    monkeypatch.setattr(pipeline._keeper.recovery, "_relocate", failing)
    desk.worker.leave()
    until(lambda: failures, "the first try")
    assert list(pipeline.submit(PROMPT, GREEDY).result().completions[0].token_ids) == expected
    desk.join()
    assert failures[0] == "desk leaves"
    assert homes(pipeline) == {"cpu"}
    assert list(pipeline.submit(PROMPT, GREEDY).result().completions[0].token_ids) == expected


def test_a_listener_that_fails_keeps_nobody_from_hearing(
    master: Master, add_worker: Callable[..., WorkerThread]
) -> None:
    heard: list[str] = []

    def fail(change: str, node: Any) -> None:
        raise RuntimeError("of no use")

    master.on_change += [fail, lambda change, node: heard.append(change)]
    add_worker("desk", "cpu=64MiB")
    until(lambda: heard == ["joined"], "the other one hears")
