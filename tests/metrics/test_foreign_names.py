"""Boards made for vLLM find our numbers under its names, counted from when the model began to be served."""

from __future__ import annotations

import pytest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from core.metrics import MetricsRegistry
from core.request import FinishedRequest

MODEL = {"model_name": "a", "engine": "0"}


@pytest.fixture
def metrics() -> MetricsRegistry:
    made = MetricsRegistry()
    made.set_model("a")
    return made


def value(metrics: MetricsRegistry, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"vllm:{name}", MODEL | labels)


def finish(metrics: MetricsRegistry, reason: str = "stop") -> None:
    metrics.observe_first_token(0.2, 8, "r")
    metrics.observe_tokens(1, None)
    metrics.observe_tokens(4, 0.03)
    metrics.observe_finished(FinishedRequest("r", reason, 8, 5, 1.0, 1.5, 2.0, 4.0))


def test_requests(metrics: MetricsRegistry) -> None:
    finish(metrics)
    finish(metrics, "length")
    finish(metrics, "error")
    assert value(metrics, "request_success_total", finished_reason="stop") == 1
    assert value(metrics, "request_success_total", finished_reason="length") == 1
    assert value(metrics, "request_success_total", finished_reason="error") is None
    assert value(metrics, "prompt_tokens_total") == 24
    assert value(metrics, "generation_tokens_total") == 15
    assert value(metrics, "time_to_first_token_seconds_count") == 3
    assert value(metrics, "time_to_first_token_seconds_bucket", le="0.25") == 3
    assert value(metrics, "time_to_first_token_seconds_bucket", le="0.1") == 0
    for name in ("inter_token_latency_seconds", "time_per_output_token_seconds"):
        assert value(metrics, f"{name}_sum") == pytest.approx(0.09)
    assert value(metrics, "e2e_request_latency_seconds_sum") == 9.0
    assert value(metrics, "request_queue_time_seconds_sum") == 1.5
    assert value(metrics, "request_prefill_time_seconds_sum") == 1.5
    assert value(metrics, "request_decode_time_seconds_sum") == 4.0
    assert value(metrics, "request_prompt_tokens_sum") == 16
    assert value(metrics, "request_generation_tokens_sum") == 10


def test_another_model_counts_anew(metrics: MetricsRegistry) -> None:
    finish(metrics)
    metrics.set_model("b")
    assert value(metrics, "generation_tokens_total") is None
    finish(metrics)
    sample = metrics.registry.get_sample_value
    other = {"model_name": "b", "engine": "0"}
    assert sample("vllm:generation_tokens_total", other) == 5
    assert sample("vllm:time_to_first_token_seconds_count", other) == 1
    assert sample("vllm:time_to_first_token_seconds_sum", other) == pytest.approx(0.2)
    assert sample("vramancer_generation_tokens_total") == 10


def test_the_same_model_goes_on(metrics: MetricsRegistry) -> None:
    finish(metrics)
    metrics.set_model("a")
    assert value(metrics, "generation_tokens_total") == 5


def test_without_a_model_nothing_is_shown(metrics: MetricsRegistry) -> None:
    finish(metrics)
    metrics.set_model(None)
    assert value(metrics, "generation_tokens_total") is None


def test_the_engine_s_own_numbers(metrics: MetricsRegistry) -> None:
    def state() -> list[Metric]:
        return [
            GaugeMetricFamily("vramancer_requests_running", "-", value=3),
            GaugeMetricFamily("vramancer_requests_waiting", "-", value=2),
            GaugeMetricFamily("vramancer_kv_cache_usage_ratio", "-", value=0.5),
            CounterMetricFamily("vramancer_preemptions", "-", value=7),
            CounterMetricFamily("vramancer_prefix_cache_hits", "-", value=11),
            GaugeMetricFamily("vramancer_batcher_batch_size", "-", value=1),
        ]

    metrics.set_engine_source(state)
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "gpu_cache_usage_perc")
    assert [value(metrics, name) for name in names] == [3, 2, 0.5, 0.5]
    assert [value(metrics, name) for name in ("num_preemptions_total", "prefix_cache_hits_total")] == [7, 11]
    assert value(metrics, "batcher_batch_size") is None
