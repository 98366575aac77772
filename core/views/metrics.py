"""What Prometheus reads of an engine at a scrape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeHistogramMetricFamily, GaugeMetricFamily, Metric

from core.batching.stats import BatcherStats
from core.engine.model_engine import ModelEngine
from core.lending import LendingStats
from core.lending.overflow import OverflowView
from core.metrics import NAMESPACE
from core.tiers import Tier
from core.tiers.hotness import HEAT_BOUNDS
from core.tiers.records import MemoryStats
from core.views.devices import Readings, device_memory
from core.views.memory import overflow_of

BYTES_PER_GIGABYTE = 1e9

Family = type[GaugeMetricFamily | CounterMetricFamily]
Rows = Iterable[tuple[Family, str, str, str]]
"""Kind, name and help text of metrics, and the field of a record that each shows."""
Samples = Iterable[tuple[Sequence[str], float]]
"""Values by the values of their labels."""

_GAUGE, _COUNTER = GaugeMetricFamily, CounterMetricFamily

_STATS = (
    (_GAUGE, "batcher_batch_size", "Sequences in the last step.", "batch_size"),
    (_GAUGE, "batcher_queue_depth", "Sequences that wait.", "waiting"),
    (_GAUGE, "batcher_throughput_tok_s", "Tokens generated per second, lately.", "tokens_per_s"),
    (_GAUGE, "requests_running", "Sequences that are being generated.", "running"),
    (_GAUGE, "requests_waiting", "Sequences that wait.", "waiting"),
    (_COUNTER, "preemptions", "Sequences put back to make room.", "preemptions"),
)
_CACHE = (
    (_COUNTER, "kv_cache_evictions", "Cached pages given up for new ones.", "evictions"),
    (_COUNTER, "prefix_cache_queries", "Prompt tokens looked up.", "queried_tokens"),
    (_COUNTER, "prefix_cache_hits", "Prompt tokens found.", "hit_tokens"),
)
_STAGE = (
    (_COUNTER, "stage_busy_seconds", "Time that a stage spent in forward passes.", "busy_s"),
    (_COUNTER, "stage_predicted_seconds", "Time that was predicted for a stage's forward passes.", "predicted_s"),
    (_COUNTER, "stage_forwards", "Forward passes of a stage.", "forwards"),
)
_TIER = (
    (_GAUGE, "memory_tier_blocks", "KV blocks in a tier.", "blocks"),
    (_GAUGE, "memory_tier_used_bytes", "Bytes in use in a tier.", "bytes"),
    (_GAUGE, "memory_tier_capacity_bytes", "Bytes a tier may use.", "capacity_bytes"),
    (_COUNTER, "memory_tier_hits", "Blocks that were looked up in a tier and found.", "hits"),
    (_COUNTER, "memory_tier_misses", "Blocks that were looked up in a tier and not found.", "misses"),
)
_READINGS = (
    ("gpu_utilization_ratio", "Share of the time that a device was busy.", "utilization"),
    ("gpu_temperature_celsius", "Temperature of a device.", "temperature_c"),
    ("gpu_power_watts", "Power that a card draws.", "power_w"),
    ("gpu_power_limit_watts", "Power that a card may draw.", "power_limit_w"),
    ("gpu_pcie_generation", "Generation of PCI Express that a card's link runs at now.", "pcie_generation"),
    ("gpu_pcie_width", "Lanes that a card's link uses now.", "pcie_width"),
    ("gpu_other_memory_bytes", "Memory of a card that other processes hold.", "other_bytes"),
)
"""Name, help text, field."""
_MOVES = (
    ("promotion", "memory_promotions", "Blocks brought to a nearer tier."),
    ("demotion", "memory_demotions", "Blocks that a farther tier keeps."),
    ("eviction", "memory_evictions", "Blocks that no tier keeps."),
)
_NOTHING_LENT = LendingStats({}, {}, 0, 0, 0)


def engine_metrics(engine: ModelEngine | None, readings: Readings) -> Iterator[Metric]:
    """The engine's state now, and what its devices said last. Counters count since it started: when a model is loaded
    or moved they begin anew. Without an engine, nothing has been counted."""
    stats = engine.batcher.stats if engine is not None else BatcherStats()
    tiers = engine.memory.tiers if engine is not None else None
    lent = overflow_of(engine) if engine is not None else None
    yield from _device_metrics(engine, readings)
    yield from _reading_metrics(readings if engine is not None else {})
    yield from _model_metrics(engine, stats)
    yield from _kv_metrics(engine, stats, lent)
    yield from _stage_metrics(engine)
    yield from _families(_STATS, (), [((), stats)])
    yield from _tier_metrics(tiers.memory.stats() if tiers is not None else MemoryStats(), lent)
    yield from _lending_metrics(lent)


def _device_metrics(engine: ModelEngine | None, readings: Readings) -> Iterator[Metric]:
    devices = engine.plan.devices if engine is not None else ()
    memory = device_memory(engine, readings) if engine is not None else {}
    used = [([name], each.used_bytes) for name, each in memory.items()]
    help_text = "Memory in use on a device, KV pages that no request uses left out."
    yield _family(_GAUGE, "gpu_memory_used_bytes", help_text, ("gpu",), used)
    total = [([name], each.total_bytes) for name, each in memory.items()]
    help_text = "Memory of a card; of a part of one, or of a processor, what may be used."
    yield _family(_GAUGE, "gpu_memory_total_bytes", help_text, ("gpu",), total)
    infos = [((device.kind, device.name, str(device.index)), 1) for device in devices]
    yield _family(_GAUGE, "device_info", "One per device, always 1.", ("backend", "name", "index"), infos)


def _reading_metrics(readings: Readings) -> Iterator[Metric]:
    """What could not be read has no sample."""
    for name, help_text, field in _READINGS:
        found = [([device], getattr(reading, field)) for device, reading in readings.items()]
        yield _family(
            _GAUGE, name, help_text, ("gpu",), [(labels, value) for labels, value in found if value is not None]
        )
    reasons = [([name, why], 1) for name, reading in readings.items() for why in reading.throttling or ()]
    yield _family(
        _GAUGE, "gpu_throttled", "1 for each reason why a card is slowed down now.", ("gpu", "reason"), reasons
    )


def _model_metrics(engine: ModelEngine | None, stats: BatcherStats) -> Iterator[Metric]:
    """A prediction is there where speeds were measured; it is 0 while nothing runs, as what is measured is."""
    loaded = [([engine.model.name, engine.model.dtype], 1)] if engine is not None else []
    yield _family(_GAUGE, "model_info", "The model that is served, always 1.", ("name", "dtype"), loaded)
    predicted: list[tuple[Sequence[str], float]] = []
    if engine is not None and engine.plan.prediction is not None:
        predicted = [((), engine.predicted_tok_s(stats.running) if stats.running else 0.0)]
    help_text = "Tokens per second that the cost model expects of as many sequences as run."
    yield _family(_GAUGE, "throughput_predicted_tok_s", help_text, (), predicted)
    is_open = [((), float(engine.batcher.breaker.state != "closed"))] if engine is not None else []
    help_text = "1 while requests are refused because steps keep failing."
    yield _family(_GAUGE, "circuit_breaker_open", help_text, (), is_open)


def _kv_metrics(engine: ModelEngine | None, stats: BatcherStats, lent: OverflowView | None) -> Iterator[Metric]:
    """Cached pages that nobody uses count as free."""
    names = [stage.device_name for stage in engine.plan.placement.stages] if engine is not None else []
    used = stats.blocks_total - stats.blocks_free
    yield _family(_GAUGE, "paged_kv_used_pages", "KV cache pages in use.", ("device",), [([n], used) for n in names])
    free = [([name], stats.blocks_free) for name in names]
    yield _family(_GAUGE, "paged_kv_free_pages", "KV cache pages that can be given out.", ("device",), free)
    usage = [((), used / stats.blocks_total)] if names and stats.blocks_total else []
    borrowed = sum(stage.borrowed_pages for stage in lent.stages) if lent is not None else 0
    help_text = "KV cache pages that stages have borrowed on other devices."
    yield _family(_GAUGE, "paged_kv_borrowed_pages", help_text, (), [((), borrowed)])
    yield _family(_GAUGE, "kv_cache_usage_ratio", "Share of KV cache pages in use.", (), usage)
    yield from _families(_CACHE, (), [((), stats)])


def _stage_metrics(engine: ModelEngine | None) -> Iterator[Metric]:
    """Predicted seconds are 0 where the device's speed is not known."""
    placed = zip(engine.plan.placement.stages, engine.stages, strict=True) if engine is not None else ()
    stages = [([f"{index}:{plan.device_name}"], stage) for index, (plan, stage) in enumerate(placed)]
    alive_s = max(engine.alive_s, 1e-9) if engine is not None else 1.0
    busy = [(name, min(1.0, stage.busy_s / alive_s)) for name, stage in stages]
    yield _family(_GAUGE, "stage_busy_ratio", "Share of the time that a stage computes.", ("stage",), busy)
    yield from _families(_STAGE, ("stage",), stages)


def _tier_metrics(stats: MemoryStats, lent: OverflowView | None) -> Iterator[Metric]:
    """Moves to and from lent memory count as between L1 and L2."""
    yield from _families(_TIER, ("tier",), [([tier.tier.name], tier) for tier in stats.tiers])
    yield _hotness(stats)
    moves: list[tuple[str, Tier, Tier | None, int]] = [(*move, blocks) for move, blocks in stats.moves.items()]
    if lent is not None:
        moves += [("demotion", Tier.L1, Tier.L2, lent.moved_out), ("promotion", Tier.L2, Tier.L1, lent.moved_home)]
    for kind, name, help_text in _MOVES:
        samples = [
            ([source.name, "none" if target is None else target.name], blocks)
            for moved, source, target, blocks in moves
            if moved == kind
        ]
        yield _family(_COUNTER, name, help_text, ("from", "to"), samples)
    arrivals: Counter[str] = Counter()
    for _, _, target, blocks in moves:
        if target is not None:
            arrivals[target.name] += blocks
    help_text = "Blocks that came to a tier from another one."
    samples = [([level], blocks) for level, blocks in arrivals.items()]
    yield _family(_COUNTER, "orch_hierarchy_moves", help_text, ("to_level",), samples)
    dropped = [((), stats.dropped_writes)] if stats.tiers else []
    help_text = "Blocks given up because writing them down was too slow."
    yield _family(_COUNTER, "memory_dropped_writes", help_text, (), dropped)


def _hotness(stats: MemoryStats) -> Metric:
    """How many blocks of each tier are at most so hot: a distribution as it is now."""
    help_text = "Blocks of a tier by hotness; 1 is one use just now, which halves with every half-life."
    family = GaugeHistogramMetricFamily(f"{NAMESPACE}_block_hotness", help_text, labels=("tier",))
    for tier in stats.tiers:
        spread = tier.hotness
        buckets = [(str(bound), float(n)) for bound, n in zip(HEAT_BOUNDS, spread.below, strict=True)]
        family.add_metric([tier.tier.name], [*buckets, ("+Inf", float(spread.count))], spread.mean * spread.count)
    return family


def _lending_metrics(lent: OverflowView | None) -> Iterator[Metric]:
    stats = lent.stats if lent is not None else _NOTHING_LENT
    yield _family(_COUNTER, "lending_borrows", "Leases granted.", ("borrower", "lender"), stats.borrows.items())
    reclaims = [([urgency.label], count) for urgency, count in stats.reclaims.items()]
    yield _family(_COUNTER, "lending_reclaims", "Times that a lender needed memory back.", ("urgency",), reclaims)
    active = [((), stats.active_leases)]
    yield _family(_GAUGE, "lending_active_leases", "Leases that are not released.", (), active)
    yield _family(_COUNTER, "lending_bytes_lent", "Bytes ever lent.", (), [((), stats.bytes_lent_total)])
    capacity = [((), stats.capacity_bytes / BYTES_PER_GIGABYTE)]
    help_text = "Gigabytes (10^9 bytes) that are lent or can be."
    yield _family(_GAUGE, "lending_pool_capacity_gb", help_text, (), capacity)


def _families(rows: Rows, labels: Sequence[str], records: Sequence[tuple[Sequence[str], object]]) -> Iterator[Metric]:
    """One family a row, with a sample for each of the records, which come with the values of their labels."""
    for kind, name, help_text, field in rows:
        yield _family(kind, name, help_text, labels, [(values, getattr(record, field)) for values, record in records])


def _family(kind: Family, name: str, help_text: str, labels: Sequence[str], samples: Samples) -> Metric:
    family = kind(f"{NAMESPACE}_{name}", help_text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family
