"""What nodes report, and what is counted of the network."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cluster.machines import WorkerThread
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from steering import until

from core.cluster import session
from core.cluster.master import Master
from core.cluster.placed_stage import PlacedRemoteStage
from core.inference_pipeline import InferencePipeline
from core.request import SamplingParams
from core.views.nodes import nodes_view

PROMPT = [5, 17, 3, 90, 42, 8, 8, 61, 7]
HIDDEN, BYTES, TOKENS = 32, 4, 12
Values = dict[tuple[str, frozenset[str]], float]


def scrape(pipeline: InferencePipeline) -> Values:
    """By name and the values of their labels."""
    families = text_string_to_metric_families(generate_latest(pipeline.metrics.registry).decode())
    return {
        (each.name.removeprefix("vramancer_"), frozenset(each.labels.values())): each.value
        for family in families
        for each in family.samples
    }


def shown(pipeline: InferencePipeline, name: str, *labels: str) -> float:
    """0 where it is not there."""
    return scrape(pipeline).get((name, frozenset(labels)), 0.0)


@pytest.fixture
def pipeline(
    add_worker: Callable[..., WorkerThread], serve: Callable[..., InferencePipeline], monkeypatch: pytest.MonkeyPatch
) -> InferencePipeline:
    """Its first stage is here, its second on a node."""
    monkeypatch.setattr(session, "REPORT_S", 0.05)
    add_worker("desk")
    return serve(devices__devices="cpu=64MiB,desk/cpu")


def generate(pipeline: InferencePipeline) -> None:
    pipeline.submit(PROMPT, SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)).result()


def test_what_crosses_the_network_is_counted(pipeline: InferencePipeline, master: Master) -> None:
    before = scrape(pipeline)
    generate(pipeline)
    after = scrape(pipeline)

    def moved(name: str, *labels: str) -> float:
        key = name, frozenset(labels)
        return after[key] - before.get(key, 0.0)

    assert moved("vtp_tensors_sent_total", "tcp") == TOKENS, "of the prompt, and of each token but the last"
    assert moved("vtp_bytes_sent_total", "tcp") == (len(PROMPT) + TOKENS - 1) * HIDDEN * BYTES
    assert moved("fastpath_bytes_total", "tcp", "sent") > moved("vtp_bytes_sent_total", "tcp")
    assert moved("fastpath_bytes_total", "tcp", "received") > 0
    assert moved("fastpath_latency_seconds_count", "tcp", "send") == TOKENS
    until(lambda: shown(pipeline, "fastpath_latency_seconds_count", "tcp", "round_trip"), "a sign of life")
    assert shown(pipeline, "telemetry_packets_total", "sent") and shown(pipeline, "telemetry_packets_total", "received")
    assert 0 < shown(pipeline, "fastpath_interface_latency_seconds", "lo", "loopback") < 1
    (node,) = master.nodes
    sent = master.traffic().sent_bytes
    node.close("pulled out")
    until(lambda: not master.nodes, "its end")
    assert master.traffic().sent_bytes >= sent, "what has been counted stays"


def test_without_other_machines_there_is_nothing_to_count(open_pipeline: Callable[..., InferencePipeline]) -> None:
    names = {name for name, _ in scrape(open_pipeline())}
    assert not any(name.startswith(("fastpath_", "vtp_", "telemetry_")) for name in names)


def test_a_node_says_how_its_devices_and_stages_are(pipeline: InferencePipeline, master: Master) -> None:
    generate(pipeline)
    stage = pipeline.engine.stages[1]
    assert isinstance(stage, PlacedRemoteStage)
    until(lambda: stage.busy_s > 0, "a report that knows of the stage")
    until(lambda: "desk/cpu" in pipeline.state().readings, "a reading")
    (node,) = master.nodes
    assert stage.forwards > TOKENS, "the first was to see whether it works"
    until(lambda: node.uses[stage.number].forwards == stage.forwards, "all its steps")
    assert shown(pipeline, "stage_busy_seconds_total", "1:desk/cpu") == stage.busy_s
    view = nodes_view(pipeline.current_engine, pipeline.state()).nodes[1]
    assert view.link is not None and (view.link.interface, view.link.kind) == ("lo", "loopback")
    assert not view.link.encrypted
    (device,) = view.devices
    assert device.reading is not None and device.reading.device == "desk/cpu" and device.reading.total_bytes
