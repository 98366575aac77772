"""The state of the engine at one moment, as metrics show it. Made by the pipeline at each scrape, never changed."""

from __future__ import annotations

from dataclasses import dataclass


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
class MetricsSnapshot:
    """Counters (`*_total`) count since the engine started; everything else is the value now.

    Filled by the pipeline: `devices` from its device list, the rest from the batcher's statistics and the runner's
    stages. `batch_size` is the sequences of the last step.
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
