"""Every metric moves when what it counts happens, and only then."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import generate_latest

from core.errors import ConfigError
from core.metrics import (
    DeviceMemory,
    KVPages,
    LendingState,
    MetricsRegistry,
    MetricsServer,
    MetricsSnapshot,
    StageWork,
    TierMoves,
    TierState,
)

SNAPSHOT = MetricsSnapshot(
    devices=(DeviceMemory("cuda:0", "cuda", 0, 3, 8), DeviceMemory("cpu:0", "cpu", 0, 1, 2)),
    kv_pages=(KVPages("cuda:0", 1, 3), KVPages("cpu:0", 1, 3)),
    batch_size=5,
    requests_running=6,
    requests_waiting=7,
    throughput_tok_s=8.5,
    preemptions_total=9,
    prefix_cache_queries_total=10,
    prefix_cache_hits_total=4,
    kv_evictions_total=2,
    stages=(StageWork("0:cuda:0", 0.75, 40, 3.0, 2.5),),
    tiers=(TierState("L3", 11, 12, 13, 14, 15, 1.25),),
    tier_moves=(
        TierMoves("promotion", "L5", "L3", 16),
        TierMoves("demotion", "L1", "L3", 17),
        TierMoves("eviction", "L5", "none", 18),
    ),
    tier_dropped_writes_total=19,
    lending=LendingState(
        {("cuda:1", "cuda:0"): 3, ("cuda:1", "host"): 1}, {"low": 0, "critical": 2}, 12_000, 4, 2_500_000_000
    ),
)


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


def test_snapshot_is_read_at_each_scrape(metrics: MetricsRegistry) -> None:
    snapshots = iter([SNAPSHOT, MetricsSnapshot(requests_waiting=1)])
    metrics.set_snapshot_source(lambda: next(snapshots))
    text = generate_latest(metrics.registry).decode()
    for line in (
        'gpu_memory_used_bytes{gpu="cuda:0"} 3.0',
        'gpu_memory_total_bytes{gpu="cuda:0"} 8.0',
        'device_info{backend="cpu",index="0",name="cpu:0"} 1.0',
        'paged_kv_used_pages{device="cpu:0"} 1.0',
        'paged_kv_free_pages{device="cpu:0"} 3.0',
        "kv_cache_usage_ratio 0.25",
        "kv_cache_evictions_total 2.0",
        "batcher_batch_size 5.0",
        "batcher_queue_depth 7.0",
        "batcher_throughput_tok_s 8.5",
        "requests_running 6.0",
        "requests_waiting 7.0",
        "preemptions_total 9.0",
        "prefix_cache_queries_total 10.0",
        "prefix_cache_hits_total 4.0",
        'stage_busy_ratio{stage="0:cuda:0"} 0.75',
        'stage_busy_seconds_total{stage="0:cuda:0"} 3.0',
        'stage_predicted_seconds_total{stage="0:cuda:0"} 2.5',
        'stage_forwards_total{stage="0:cuda:0"} 40.0',
        'memory_tier_blocks{tier="L3"} 11.0',
        'memory_tier_used_bytes{tier="L3"} 12.0',
        'memory_tier_capacity_bytes{tier="L3"} 13.0',
        'memory_tier_hits_total{tier="L3"} 14.0',
        'memory_tier_misses_total{tier="L3"} 15.0',
        'block_hotness{tier="L3"} 1.25',
        'memory_promotions_total{from="L5",to="L3"} 16.0',
        'memory_demotions_total{from="L1",to="L3"} 17.0',
        'memory_evictions_total{from="L5",to="none"} 18.0',
        "memory_dropped_writes_total 19.0",
        'lending_borrows_total{borrower="cuda:1",lender="cuda:0"} 3.0',
        'lending_borrows_total{borrower="cuda:1",lender="host"} 1.0',
        'lending_reclaims_total{urgency="low"} 0.0',
        'lending_reclaims_total{urgency="critical"} 2.0',
        "lending_active_leases 4.0",
        "lending_bytes_lent_total 12000.0",
        "lending_pool_capacity_gb 2.5",
    ):
        assert f"vramancer_{line}\n" in text
    assert value(metrics, "requests_waiting") == 1


def test_an_engine_that_never_lent_says_so(metrics: MetricsRegistry) -> None:
    metrics.set_snapshot_source(MetricsSnapshot)
    assert value(metrics, "lending_active_leases") == value(metrics, "lending_bytes_lent_total") == 0
    assert value(metrics, "lending_pool_capacity_gb") == 0


def test_without_an_engine_its_metrics_are_absent(metrics: MetricsRegistry) -> None:
    metrics.set_snapshot_source(lambda: SNAPSHOT)
    metrics.set_snapshot_source(None)
    assert "batcher" not in generate_latest(metrics.registry).decode()


def test_registries_do_not_share(metrics: MetricsRegistry) -> None:
    metrics.observe_first_token(1.0)
    assert value(MetricsRegistry(), "time_to_first_token_seconds_count") == 0


def test_all_names_have_the_prefix(metrics: MetricsRegistry) -> None:
    metrics.set_snapshot_source(lambda: SNAPSHOT)
    names = [line.split()[2] for line in generate_latest(metrics.registry).decode().splitlines() if "# TYPE" in line]
    assert names
    assert all(name.startswith("vramancer_") for name in names)


# -- the listener ------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(metrics: MetricsRegistry) -> Iterator[MetricsServer]:
    server = MetricsServer(metrics, "127.0.0.1", 0)
    server.start()
    yield server
    server.stop()


def fetch(server: MetricsServer) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=60) as response:
        text: str = response.read().decode()
        return text


def test_listener_serves_the_registry(metrics: MetricsRegistry, server: MetricsServer) -> None:
    metrics.count_environment_hit()
    assert "vramancer_env_endpoint_hits_total 1.0" in fetch(server)


def test_listener_ends_with_its_thread(metrics: MetricsRegistry) -> None:
    before = threading.active_count()
    server = MetricsServer(metrics, "127.0.0.1", 0)
    server.start()
    fetch(server)
    server.stop()
    server.stop()
    assert threading.active_count() == before
    with pytest.raises(OSError, match="refused"):
        fetch(server)


def test_a_port_that_is_taken_names_the_setting(metrics: MetricsRegistry, server: MetricsServer) -> None:
    with pytest.raises(ConfigError, match="VRM_METRICS_PORT"):
        MetricsServer(metrics, "127.0.0.1", server.port).start()
