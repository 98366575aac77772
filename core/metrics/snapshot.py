"""The engine's state at one moment, as metrics show it. Made by `core.views.metrics` at each scrape, never changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """One logical device. `total_bytes` is its memory limit, `index` its number among those of its backend."""

    name: str
    backend: str
    index: int
    used_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class KVPages:
    """KV cache pages of one device; cached pages that nobody uses count as free."""

    device: str
    used: int
    free: int


@dataclass(frozen=True, slots=True)
class StageWork:
    """One stage since the engine started: forward passes, seconds spent in them, and seconds that were predicted for
    them (0 where the device's speed is not known). `busy` is the share of the time."""

    name: str
    busy: float
    forwards: int
    busy_s: float
    predicted_s: float


@dataclass(frozen=True, slots=True)
class TierState:
    """One memory tier (`name` is L1 to L6). Hits and misses count blocks of prefixes looked up there since the start;
    `hotness` is the mean over its blocks, 0 for none."""

    name: str
    blocks: int
    used_bytes: int
    capacity_bytes: int
    hits: int
    misses: int
    hotness: float


@dataclass(frozen=True, slots=True)
class TierMoves:
    """Blocks that went from one tier to another since the start; `kind` is promotion, demotion or eviction, and an
    eviction's `target` is none."""

    kind: str
    source: str
    target: str
    blocks: int


@dataclass(frozen=True, slots=True)
class LendingState:
    """The lending pool: leases granted by `(borrower, lender)` and reclaims by urgency since the engine started, bytes
    ever lent; leases that are not released and what the pool can hold now."""

    borrows_total: Mapping[tuple[str, str], int] = field(default_factory=dict)
    reclaims_total: Mapping[str, int] = field(default_factory=dict)
    bytes_lent_total: int = 0
    active_leases: int = 0
    capacity_bytes: int = 0


@dataclass(frozen=True, slots=True)
class MetricsSnapshot:
    """Counters (`*_total`) count since the engine started; everything else is the value now.

    Filled by `core.views.metrics`: `devices` from the plan, tiers from `MemoryStats.for_metrics`, `lending` from the
    statistics of the lending pool, the rest from the batcher's statistics and the runner's stages. `batch_size` is the
    sequences of the last step.
    """

    devices: tuple[DeviceMemory, ...] = ()
    kv_pages: tuple[KVPages, ...] = ()
    batch_size: int = 0
    requests_running: int = 0
    requests_waiting: int = 0
    throughput_tok_s: float = 0.0
    preemptions_total: int = 0
    prefix_cache_queries_total: int = 0
    prefix_cache_hits_total: int = 0
    kv_evictions_total: int = 0
    stages: tuple[StageWork, ...] = ()
    tiers: tuple[TierState, ...] = ()
    tier_moves: tuple[TierMoves, ...] = ()
    tier_dropped_writes_total: int = 0
    lending: LendingState = field(default_factory=LendingState)
