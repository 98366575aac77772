"""Every metric moves when what it counts happens, and only then."""

from __future__ import annotations

from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics

from core.metrics import COMING, NAMESPACE, MetricsRegistry, Percentiles
from core.metrics.registry import Window
from core.request import FinishedRequest, TraceContext


@pytest.fixture
def metrics() -> MetricsRegistry:
    return MetricsRegistry()


def value(metrics: MetricsRegistry, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"vramancer_{name}", labels)


def finished(
    reason: str, *, submitted_s: float = 10.0, started_s: float | None = 11.0, first_token_s: float | None = 13.0,
    ended_s: float = 20.0, prompt_tokens: int = 10, output_tokens: int = 30,
) -> FinishedRequest:  # fmt: skip
    return FinishedRequest(
        "req-1", reason, prompt_tokens, output_tokens, submitted_s, started_s, first_token_s, ended_s
    )


def test_finished_requests(metrics: MetricsRegistry) -> None:
    metrics.observe_finished(finished("stop"))
    metrics.observe_finished(finished("error", ended_s=25.0))
    metrics.observe_finished(finished("abort", started_s=None, first_token_s=None))
    assert value(metrics, "infer_total") == 3
    assert value(metrics, "infer_errors_total") == 1
    assert value(metrics, "requests_aborted_total") == 1
    reasons = {
        reason: value(metrics, "requests_finished_total", reason=reason) for reason in ("stop", "length", "error")
    }
    assert reasons == {"stop": 1, "length": 0, "error": 1}
    assert value(metrics, "infer_latency_seconds_count") == 2
    assert value(metrics, "infer_latency_seconds_sum") == 25.0


def test_a_request_s_time_is_queue_prefill_and_decode(metrics: MetricsRegistry) -> None:
    metrics.observe_finished(finished("length"))
    sums = [value(metrics, f"request_{phase}_seconds_sum") for phase in ("queue", "prefill", "decode")]
    assert sums == [1.0, 2.0, 7.0]
    assert value(metrics, "request_prompt_tokens_sum") == 10
    assert value(metrics, "request_generation_tokens_sum") == 30


def test_a_request_that_was_given_up_while_it_waited_has_no_phases(metrics: MetricsRegistry) -> None:
    metrics.observe_finished(finished("abort", started_s=None, first_token_s=None))
    for phase in ("queue", "prefill", "decode"):
        assert value(metrics, f"request_{phase}_seconds_count") == 0


def test_tokens(metrics: MetricsRegistry) -> None:
    metrics.observe_first_token(0.5, 100, "req-1")
    metrics.observe_tokens(2, None)
    metrics.observe_tokens(3, 0.02)
    assert value(metrics, "prompt_tokens_total") == 100
    assert value(metrics, "generation_tokens_total") == 5
    assert value(metrics, "time_to_first_token_seconds_sum") == 0.5
    assert value(metrics, "inter_token_latency_seconds_count") == 1
    assert value(metrics, "inter_token_latency_seconds_bucket", le="0.025") == 1
    assert value(metrics, "inter_token_latency_seconds_bucket", le="0.01") == 0


def test_whoever_asks_for_openmetrics_gets_the_request_s_id(metrics: MetricsRegistry) -> None:
    metrics.observe_first_token(0.5, 1, "cmpl-abc")
    metrics.observe_http("/v1/models", "GET", 200, 0.1, "x" * 128)
    text = openmetrics(metrics.registry).decode()
    first = next(line for line in text.splitlines() if "time_to_first_token_seconds_bucket" in line and " # " in line)
    assert first.split(" # ")[1].startswith('{request_id="cmpl-abc"} 0.5')
    assert f'# {{request_id="{"x" * 118}"}} 0.1' in text, "as much as OpenMetrics allows"
    assert " # {" not in generate_latest(metrics.registry).decode()


def test_and_the_trace_s_id_if_that_is_recorded(metrics: MetricsRegistry) -> None:
    trace = TraceContext("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")
    metrics.observe_first_token(0.5, 1, "cmpl-abc", trace.trace_id)
    metrics.observe_finished(replace(finished("stop"), trace=trace))
    metrics.observe_http("/v1/models", "GET", 200, 0.1, "x" * 128, trace.trace_id)
    text = openmetrics(metrics.registry).decode()
    for name, request_id in (
        ("time_to_first_token", "cmpl-abc"), ("infer_latency", "req-1"), ("api_latency", "x" * 78)
    ):  # fmt: skip
        (line,) = [line for line in text.splitlines() if f"{name}_seconds_bucket" in line and " # " in line]
        assert f'# {{request_id="{request_id}",trace_id="{trace.trace_id}"}}' in line


def test_percentiles_of_late(metrics: MetricsRegistry) -> None:
    assert metrics.latency()["first_token"] == Percentiles(0, None, None, None)
    for hundredths in range(100, 0, -1):
        metrics.observe_first_token(hundredths / 100, 1, "r")
        metrics.observe_tokens(1, hundredths / 1000)
    metrics.observe_finished(finished("stop"))
    latency = metrics.latency()
    assert latency["first_token"] == Percentiles(100, 0.5, 0.95, 0.99)
    assert latency["between_tokens"] == Percentiles(100, 0.05, 0.095, 0.099)
    assert latency["request"] == Percentiles(1, 10.0, 10.0, 10.0)


def test_what_is_older_than_the_last_minutes_is_left_out() -> None:
    now = iter([0.0, 200.0, 301.0])
    window = Window(4, clock=lambda: next(now))
    window.add(1.0)
    window.add(2.0)
    assert window.values() == [2.0]


def test_a_window_keeps_the_last_ones() -> None:
    window = Window(2, clock=lambda: 0.0)
    for seconds in (1.0, 2.0, 3.0):
        window.add(seconds)
    assert sorted(window.values()) == [2.0, 3.0]


def test_placements_and_migrations(metrics: MetricsRegistry) -> None:
    metrics.observe_placement(streams=False)
    metrics.observe_placement(streams=True)
    metrics.observe_placement(streams=True)
    metrics.observe_migration(5, unasked=False)
    metrics.observe_migration(2, unasked=True)
    assert value(metrics, "orch_placements_total", level="L1") == 1
    assert value(metrics, "orch_placements_total", level="L3") == 2
    assert value(metrics, "orch_migrations_total") == 7
    assert value(metrics, "orch_rebalance_total") == 1


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
    metrics.observe_first_token(1.0, 1, "r")
    assert value(MetricsRegistry(), "time_to_first_token_seconds_count") == 0


def test_all_names_have_the_prefix(metrics: MetricsRegistry) -> None:
    names = [line.split()[2] for line in generate_latest(metrics.registry).decode().splitlines() if "# TYPE" in line]
    assert names
    assert all(name.startswith("vramancer_") for name in names)


def test_what_belongs_to_features_to_come_is_absent(metrics: MetricsRegistry) -> None:
    text = generate_latest(metrics.registry).decode()
    assert COMING
    assert not [prefix for prefix in COMING if f"{NAMESPACE}_{prefix}" in text]


def test_a_registry_can_be_given() -> None:
    registry = CollectorRegistry()
    MetricsRegistry(registry).observe_placement(streams=False)
    assert registry.get_sample_value("vramancer_orch_placements_total", {"level": "L1"}) == 1
