"""Every metric moves when what it counts happens, and only then."""

from __future__ import annotations

import pytest
from prometheus_client import generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from core.metrics import MetricsRegistry


@pytest.fixture
def metrics() -> MetricsRegistry:
    return MetricsRegistry()


def value(metrics: MetricsRegistry, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"vramancer_{name}", labels)


def test_finished_requests(metrics: MetricsRegistry) -> None:
    metrics.observe_finished(2.0, 10, 20, "stop")
    metrics.observe_finished(3.0, 1, 2, "error")
    metrics.observe_finished(9.0, 1, 0, "abort")
    assert value(metrics, "infer_total") == 3
    assert value(metrics, "infer_errors_total") == 1
    assert value(metrics, "requests_aborted_total") == 1
    assert value(metrics, "prompt_tokens_total") == 12
    assert value(metrics, "generation_tokens_total") == 22
    assert value(metrics, "infer_latency_seconds_count") == 2
    assert value(metrics, "infer_latency_seconds_sum") == 5.0


def test_token_latencies(metrics: MetricsRegistry) -> None:
    metrics.observe_first_token(0.5)
    metrics.observe_inter_token(0.02)
    assert value(metrics, "time_to_first_token_seconds_sum") == 0.5
    assert value(metrics, "inter_token_latency_seconds_bucket", le="0.025") == 1
    assert value(metrics, "inter_token_latency_seconds_bucket", le="0.01") == 0


def test_latencies_beyond_the_alerts_thresholds_have_buckets(metrics: MetricsRegistry) -> None:
    for threshold in ("5.0", "10.0", "30.0"):
        assert value(metrics, "infer_latency_seconds_bucket", le=threshold) == 0


def test_transfers(metrics: MetricsRegistry) -> None:
    for _ in range(2):
        metrics.observe_transfer("staged", "cuda:0", "cuda:1", 10**9, 4.0)
    assert value(metrics, "gpu_transfer_ops_total", method="staged", src="cuda:0", dst="cuda:1") == 2
    assert value(metrics, "gpu_transfer_bandwidth_gbps", method="staged") == pytest.approx(2.0)
    there = {"method": "staged", "src": "cuda:0", "dst": "cuda:1"}
    assert value(metrics, "transfer_bytes_total", **there) == 2e9
    assert value(metrics, "transfer_seconds_total", **there) == 8.0
    metrics.observe_transfer("p2p", "cuda:0", "cuda:1", 10, 0.0)
    assert value(metrics, "gpu_transfer_bandwidth_gbps", method="p2p") is None


def test_http(metrics: MetricsRegistry) -> None:
    metrics.observe_http("/v1/models", "GET", 200, 0.1)
    metrics.count_environment_hit()
    assert value(metrics, "api_latency_seconds_count", path="/v1/models", method="GET", status="200") == 1
    assert value(metrics, "env_endpoint_hits_total") == 1


def waiting(count: float) -> list[Metric]:
    return [GaugeMetricFamily("vramancer_requests_waiting", "Sequences that wait.", value=count)]


def test_the_engine_is_asked_at_each_scrape(metrics: MetricsRegistry) -> None:
    states = iter([waiting(7), waiting(1)])
    metrics.set_engine_source(lambda: next(states))
    assert "vramancer_requests_waiting 7.0\n" in generate_latest(metrics.registry).decode()
    assert value(metrics, "requests_waiting") == 1


def test_without_an_engine_its_metrics_are_absent(metrics: MetricsRegistry) -> None:
    metrics.set_engine_source(lambda: waiting(7))
    metrics.set_engine_source(None)
    assert value(metrics, "requests_waiting") is None


def test_registries_do_not_share(metrics: MetricsRegistry) -> None:
    metrics.observe_first_token(1.0)
    assert value(MetricsRegistry(), "time_to_first_token_seconds_count") == 0


def test_all_names_have_the_prefix(metrics: MetricsRegistry) -> None:
    names = [line.split()[2] for line in generate_latest(metrics.registry).decode().splitlines() if "# TYPE" in line]
    assert names
    assert all(name.startswith("vramancer_") for name in names)
