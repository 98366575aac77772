"""Each alert whose metrics exist reaches somebody through the real Prometheus and Alertmanager, and no other does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from alert_harness import Page, alertmanager, exporter, get_json, prometheus, until, webhook
from known_metrics import COMING
from monitoring_files import alerts, as_grafana_asks, board, metric_names, panels, program, recorded

HEALTHY: dict[str, Any] = {
    'gpu_memory_used_bytes{gpu="cuda:0"}': 50,
    'gpu_memory_total_bytes{gpu="cuda:0"}': 100,
    "infer_total": "100*n",
    "infer_errors_total": 0,
    'infer_latency_seconds_bucket{le="10.0"}': "100*n",
    'infer_latency_seconds_bucket{le="30.0"}': "100*n",
    'infer_latency_seconds_bucket{le="60.0"}': "100*n",
    'infer_latency_seconds_bucket{le="+Inf"}': "100*n",
    "requests_waiting": 3,
    "tasks_running": 1,
    "tasks_completed_total": "10*n",
    "tasks_failed_total": 0,
    'api_latency_seconds_bucket{path="/v1/models",method="GET",status="200",le="5.0"}': "100*n",
    'api_latency_seconds_bucket{path="/v1/models",method="GET",status="200",le="10.0"}': "100*n",
    'api_latency_seconds_bucket{path="/v1/models",method="GET",status="200",le="+Inf"}': "100*n",
    'gpu_transfer_bandwidth_gbps{method="staged"}': 20,
    'gpu_transfer_ops_total{method="staged",src="cuda:0",dst="cuda:1"}': "10*n",
    'transfer_bytes_total{method="staged",src="cuda:0",dst="cuda:1"}': "10485760*n",
    'fastpath_latency_seconds_bucket{method="tcp",op="round_trip",le="0.1"}': "100*n",
    'fastpath_latency_seconds_bucket{method="tcp",op="round_trip",le="0.25"}': "100*n",
    'fastpath_latency_seconds_bucket{method="tcp",op="round_trip",le="+Inf"}': "100*n",
    "orch_rebalance_total": 2,
    'memory_evictions_total{from="L3",to="none"}': 7,
}
"""Metrics of a node that is busy and well; n is the number of the scrape."""


def page(**changed: Any) -> Page:
    """A node that is well but for what is changed, by the beginnings of names. None: it does not show that."""

    def text(n: int) -> str:
        lines = []
        for name, value in HEALTHY.items():
            value = next((new for start, new in changed.items() if name.startswith(start)), value)
            if value is not None:
                number = int(value.removesuffix("*n")) * n if isinstance(value, str) else value
                lines.append(f"vramancer_{name} {number}\n")
        return "".join(lines)

    return text


FAULTS = {
    "GPUMemoryHigh": page(gpu_memory_used_bytes=95),
    "GPUMemoryCritical": page(gpu_memory_used_bytes=99),
    "NoGPUMetrics": page(gpu_memory=None),
    "HighInferenceErrorRate": page(infer_errors_total="10*n"),
    "HighInferenceLatency": page(**{'infer_latency_seconds_bucket{le="10.0"}': "50*n"}),
    "InferenceLatencyCritical": page(
        **{
            'infer_latency_seconds_bucket{le="10.0"}': "97*n",
            'infer_latency_seconds_bucket{le="30.0"}': "97*n",
        }
    ),
    "InferenceStopped": page(infer_total=1000, infer_latency_seconds_bucket=1000),
    "TaskQueueBacklog": page(tasks_running=17),
    "HighTaskFailureRate": page(tasks_failed_total="2*n"),
    "APILatencyHigh": page(
        **{'api_latency_seconds_bucket{path="/v1/models",method="GET",status="200",le="5.0"}': "50*n"}
    ),
    "APIDown": lambda n: "",
    "FastPathLatencyHigh": page(**{'fastpath_latency_seconds_bucket{method="tcp",op="round_trip",le="0.1"}': "50*n"}),
    "GPUTransferBandwidthLow": page(gpu_transfer_bandwidth_gbps=0.5),
    "FrequentRebalancing": page(orch_rebalance_total="1*n"),
    "HighMemoryEvictions": page(memory_evictions_total="1000*n"),
}
"""By the alert that each causes, which is also the name of the node."""
UNWELL = {(name, name) for name in FAULTS}


def test_faults_are_those_of_all_alerts_whose_metrics_exist() -> None:
    coming = {
        name
        for name, rule in alerts().items()
        for metric in metric_names(rule["expr"])
        if any(later in f"{metric} {recorded().get(metric, '')}" for later in COMING)
    }
    assert coming == {"HAJournalLarge"}
    assert set(FAULTS) == set(alerts()) - coming


@pytest.mark.slow
def test_each_fault_is_told_and_nothing_else(tmp_path: Path) -> None:
    program("prometheus"), program("alertmanager")
    pages = {"well": page(), **FAULTS}
    with webhook() as told, exporter(pages) as port, alertmanager(tmp_path, told.url) as manager:
        targets = [
            {"targets": [f"127.0.0.1:{port}"], "labels": {"__metrics_path__": f"/{name}", "instance": name}}
            for name in pages
        ]
        with prometheus(tmp_path, targets, f"127.0.0.1:{manager.port}") as prom:
            until(lambda: told.alerts() >= UNWELL, f"all alerts arrive: {UNWELL - told.alerts()}")
            also_firing = prom.firing() - UNWELL
            assert also_firing == {("GPUMemoryCritical", "GPUMemoryHigh")}, "a card that is 99 % full is also 90 % full"
            assert told.alerts() == UNWELL, "and the worse of both alerts is told alone"
            (held_back,) = [
                alert
                for alert in get_json(f"{manager.url}/api/v2/alerts")
                if (alert["labels"]["instance"], alert["labels"]["alertname"]) in also_firing
            ]
            assert held_back["status"]["state"] == "suppressed" and held_back["status"]["inhibitedBy"]
            severities = {alert["labels"]["alertname"]: alert["receiver"] for alert in told.told}
            assert severities == {name: alerts()[name]["labels"]["severity"] for name in FAULTS}
            assert prom.unhealthy_rules() == []
            (panel,) = (each for each in panels(board()) if each["title"] == "Alerts over time")
            drawn = prom.query(as_grafana_asks(panel["targets"][0]["expr"]))
            assert {(each["metric"]["instance"], each["metric"]["alertname"]) for each in drawn} >= UNWELL

            pages.update(dict.fromkeys(FAULTS, page()))
            until(lambda: told.alerts("resolved") >= UNWELL, "all alerts end once the nodes are well")
            until(lambda: not prom.firing(), "no alert is left")
            assert told.alerts() == UNWELL
