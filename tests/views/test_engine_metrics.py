"""Every metric of an engine shows what the engine has counted."""

from __future__ import annotations

from types import SimpleNamespace as Fake
from typing import Any, cast

from prometheus_client import generate_latest

from core.batching.stats import BatcherStats
from core.devices import Device
from core.devices.readings import DeviceReading
from core.engine.model_engine import ModelEngine
from core.lending import LendingStats, Urgency
from core.lending.overflow import LeaseView, StagePagesView
from core.metrics import MetricsRegistry
from core.tiers import Tier
from core.tiers.hotness import HeatSpread
from core.tiers.records import MemoryStats, TierStats
from core.views.metrics import engine_metrics


def exposed(engine: Any, readings: dict[str, DeviceReading] | None = None) -> str:
    metrics = MetricsRegistry()
    metrics.set_engine_source(lambda: engine_metrics(cast("ModelEngine | None", engine), readings or {}))
    return generate_latest(metrics.registry).decode()


def fake_engine() -> Any:
    stats = BatcherStats(
        batch_size=5, running=6, waiting=7, tokens_per_s=8.5, preemptions=9, queried_tokens=10, hit_tokens=4,
        evictions=2, blocks_total=4, blocks_free=3,
    )  # fmt: skip
    tiers = MemoryStats(
        (TierStats(Tier.L3, 11, 12, 13, 14, 15, HeatSpread(11, (0, 0, 1, 1, 2, 4, 4, 8, 11, 11), 1.25), None),),
        {("promotion", Tier.L5, Tier.L3): 16, ("demotion", Tier.L1, Tier.L3): 17, ("eviction", Tier.L5, None): 18},
        dropped_writes=19,
    )
    lent = LendingStats(
        {("cuda:1", "cuda:0"): 3, ("cuda:1", "host"): 1}, {Urgency.LOW: 0, Urgency.CRITICAL: 2}, 12_000, 4,
        2_500_000_000,
    )  # fmt: skip
    devices = [
        Device("cuda:0", 0, "cuda", "cuda:0", 800),
        Device("cpu:0", 0, "cpu", "cpu", 200),
    ]
    placed = [Fake(device_name="cuda:0"), Fake(device_name="cpu:0")]
    return Fake(
        batcher=Fake(stats=stats, breaker=Fake(state="half_open")),
        memory=Fake(
            tiers=Fake(memory=Fake(stats=lambda: tiers)),
            overflow=Fake(
                view=Fake(
                    stats=lent,
                    moved_out=20,
                    moved_home=21,
                    stages=(StagePagesView(1, "cpu:0", 3, 1, 0, 10),),
                    leases=(LeaseView(1, "cpu:0", "cuda:0", 100, 1, "active", 0, 1.0),),
                )
            ),
        ),
        model=Fake(name="owner/name", dtype="bfloat16"),
        plan=Fake(devices=devices, placement=Fake(stages=placed), prediction=object()),
        predicted_tok_s=lambda streams: 100.0 * streams,
        budgets={
            "cuda:0": Fake(used_bytes=400, used_by_purpose=lambda: {"weights": 100, "kv_cache": 200, "kv_lent": 100}),
            "cpu:0": Fake(used_bytes=90, used_by_purpose=lambda: {"weights": 50, "kv_cache": 40}),
        },
        stages=[Fake(busy_s=3.0, predicted_s=2.5, forwards=40), Fake(busy_s=9.0, predicted_s=0.0, forwards=41)],
        alive_s=4.0,
    )


def test_an_engine_shows_everything() -> None:
    text = exposed(fake_engine())
    for line in (
        'gpu_memory_used_bytes{gpu="cuda:0"} 175.0',  # 3 of 4 blocks are free: of its own pages and of those it lent
        'gpu_memory_used_bytes{gpu="cpu:0"} 60.0',
        'gpu_memory_total_bytes{gpu="cuda:0"} 800.0',
        'model_info{dtype="bfloat16",name="owner/name"} 1.0',
        "throughput_predicted_tok_s 600.0",
        "circuit_breaker_open 1.0",
        "paged_kv_borrowed_pages 1.0",
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
        'stage_busy_ratio{stage="1:cpu:0"} 1.0',
        'stage_busy_seconds_total{stage="0:cuda:0"} 3.0',
        'stage_predicted_seconds_total{stage="0:cuda:0"} 2.5',
        'stage_forwards_total{stage="0:cuda:0"} 40.0',
        'memory_tier_blocks{tier="L3"} 11.0',
        'memory_tier_used_bytes{tier="L3"} 12.0',
        'memory_tier_capacity_bytes{tier="L3"} 13.0',
        'memory_tier_hits_total{tier="L3"} 14.0',
        'memory_tier_misses_total{tier="L3"} 15.0',
        'block_hotness_bucket{le="0.1",tier="L3"} 1.0',
        'block_hotness_bucket{le="1.0",tier="L3"} 4.0',
        'block_hotness_bucket{le="+Inf",tier="L3"} 11.0',
        'block_hotness_gcount{tier="L3"} 11.0',
        'block_hotness_gsum{tier="L3"} 13.75',
        'orch_hierarchy_moves_total{to_level="L3"} 33.0',
        'orch_hierarchy_moves_total{to_level="L1"} 21.0',
        'orch_hierarchy_moves_total{to_level="L2"} 20.0',
        'memory_promotions_total{from="L5",to="L3"} 16.0',
        'memory_promotions_total{from="L2",to="L1"} 21.0',
        'memory_demotions_total{from="L1",to="L3"} 17.0',
        'memory_demotions_total{from="L1",to="L2"} 20.0',
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
    names = [line.split()[2] for line in text.splitlines() if "# TYPE" in line]
    assert all(name.startswith(("vramancer_", "vllm:")) for name in names)


def test_a_card_of_its_own_counts_with_everybody_s_use_of_it() -> None:
    card = DeviceReading(
        "cuda:0", total_bytes=1000, used_bytes=700, utilization=0.5, temperature_c=61.0, power_w=250.0,
        power_limit_w=350.0, pcie_generation=4, pcie_width=8, throttling=("power limit",), other_bytes=50,
    )  # fmt: skip
    main = DeviceReading("cpu:0", total_bytes=5000, used_bytes=4000, utilization=0.25)
    text = exposed(fake_engine(), {"cuda:0": card, "cpu:0": main})
    for line in (
        'gpu_memory_used_bytes{gpu="cuda:0"} 475.0',
        'gpu_memory_total_bytes{gpu="cuda:0"} 1000.0',
        'gpu_memory_used_bytes{gpu="cpu:0"} 60.0',
        'gpu_memory_total_bytes{gpu="cpu:0"} 200.0',
        'gpu_utilization_ratio{gpu="cpu:0"} 0.25',
        'gpu_temperature_celsius{gpu="cuda:0"} 61.0',
        'gpu_power_watts{gpu="cuda:0"} 250.0',
        'gpu_power_limit_watts{gpu="cuda:0"} 350.0',
        'gpu_pcie_generation{gpu="cuda:0"} 4.0',
        'gpu_pcie_width{gpu="cuda:0"} 8.0',
        'gpu_throttled{gpu="cuda:0",reason="power limit"} 1.0',
        'gpu_other_memory_bytes{gpu="cuda:0"} 50.0',
    ):
        assert f"vramancer_{line}\n" in text
    assert 'gpu_temperature_celsius{gpu="cpu:0"}' not in text


def test_without_an_engine_nothing_has_been_counted() -> None:
    text = exposed(None)
    for line in ("batcher_batch_size", "lending_active_leases", "lending_bytes_lent_total", "lending_pool_capacity_gb"):
        assert f"vramancer_{line} 0.0\n" in text
    assert "\nvramancer_kv_cache_usage_ratio" not in text
