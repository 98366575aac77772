"""Spans of background work, and where else a trace's id is found: in log lines and in exemplars."""

from __future__ import annotations

import http.client
import json
import logging
import re
import threading
from pathlib import Path

import pytest
import structlog
from steering import LONGEST_WAIT_S, until
from tracing.collector import Collector
from tracing.conftest import DEVICES, HEADERS, Open, Service

from core.config import TracingSettings
from core.metrics.tasks import TaskLog
from core.tracing.tracing import Tracing

ROUTE = "POST /v1/completions"


def test_loading_and_moving_a_model(service: Service, collector: Collector) -> None:
    first = collector.one("task load")
    assert (first.parent, first.status) == ("", "unset")
    assert re.fullmatch(r".*/llama\d+", first.attributes["vramancer.task.detail"])
    assert service.ask("POST", "/api/pipeline/place", {"devices": DEVICES, "layers": "1,3"})[0] == 200
    server, task = collector.one("POST /api/pipeline/place"), collector.one("task placement")
    assert (task.parent, task.trace) == (server.id, server.trace)
    assert server.holds(task)
    expected = {"kind": "placement", "priority": "normal", "resource": "devices"}
    assert {name: task.attributes[f"vramancer.task.{name}"] for name in expected} == expected


def test_a_load_that_fails(service: Service, collector: Collector, tmp_path: Path) -> None:
    status, _ = service.ask("POST", "/api/models/load", {"model": str(tmp_path)})
    server = collector.one("POST /api/models/load")
    (task,) = [span for span in collector.named("task load") if span.parent]
    assert (task.parent, task.status) == (server.id, "error") and status >= 400
    assert task.attributes["error.type"].endswith("Error") and task.message


def test_work_that_nobody_asked_for_begins_a_trace(collector: Collector) -> None:
    tracing, tasks = Tracing(TracingSettings(enabled=True)), TaskLog()
    tasks.watch = tracing.task

    def recover() -> None:
        with tasks.run("recovery", "a model", priority="high"):
            pass

    with tasks.run("outer"):
        with tasks.run("inner"):
            pass
        other = threading.Thread(target=recover)
        other.start()
        other.join()
    tracing.close()
    outer, inner, recovery = (collector.one(f"task {kind}") for kind in ("outer", "inner", "recovery"))
    assert outer.parent == recovery.parent == "" and outer.trace != recovery.trace
    assert inner.parent == outer.id and outer.holds(inner)
    assert recovery.attributes["vramancer.task.priority"] == "high"


def test_work_in_a_request_that_is_not_recorded_is_not_either(collector: Collector) -> None:
    tracing, tasks = Tracing(TracingSettings(enabled=True)), TaskLog()
    tasks.watch = tracing.task
    caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
    assert tracing.serve("a request", {}, caller, None) is None
    with tasks.run("load"):
        pass
    served = tracing.serve("another", {}, None, None)
    assert served is not None
    served.end(200)
    with tasks.run("later"):
        pass
    tracing.close()
    assert {span.name: span.parent for span in collector.spans} == {"another": "", "task later": ""}


def test_log_lines_of_a_request_have_its_trace(
    service: Service, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        service.complete(3)
        service.ask("GET", "/v1/models")
        until(lambda: len([r for r in caplog.records if "request answered" in r.getMessage()]) == 2, "both lines")
    answered = [record.getMessage() for record in caplog.records if "request answered" in record.getMessage()]
    (traced,) = [line for line in answered if "/v1/completions" in line]
    (other,) = [line for line in answered if "/v1/models" in line]
    server = collector.one(ROUTE)
    assert f"'trace_id': '{server.trace}'" in traced and f"'span_id': '{server.id}'" in traced
    assert "trace_id" not in other


def exemplars(service: Service) -> dict[str, dict[str, str]]:
    """Labels of exemplars, by metric."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=LONGEST_WAIT_S)
    connection.request("GET", "/metrics", headers=HEADERS | {"Accept": "application/openmetrics-text; version=1.0.0"})
    text = connection.getresponse().read().decode()
    connection.close()
    found = {}
    for line in text.splitlines():
        sample, mark, exemplar = line.partition(" # ")
        if mark and not line.startswith("#"):
            pairs = exemplar[1 : exemplar.index("}")].split(",")
            found[sample.partition("{")[0]] = {name: json.loads(value) for name, value in (p.split("=") for p in pairs)}
    return found


def test_exemplars_have_the_trace(service: Service, collector: Collector) -> None:
    service.complete(3)
    server = collector.one(ROUTE)
    found = exemplars(service)
    for name in ("time_to_first_token", "infer_latency", "api_latency"):
        labels = found[f"vramancer_{name}_seconds_bucket"]
        assert labels["trace_id"] == server.trace and labels["request_id"], name


def test_exemplars_of_what_is_not_recorded_have_the_request_alone(collector: Collector, open_service: Open) -> None:
    service = open_service(tracing__sample_ratio=0.0)
    service.complete(3)
    found = exemplars(service)
    assert found and all(set(labels) == {"request_id"} for labels in found.values())


@pytest.fixture(autouse=True)
def no_context_left() -> None:
    structlog.contextvars.clear_contextvars()
