"""Prometheus metrics: a registry fed by events and by snapshots, and the listener that serves it."""

from core.metrics.registry import MetricsRegistry
from core.metrics.server import MetricsServer
from core.metrics.snapshot import (
    DeviceMemory,
    KVPages,
    LendingState,
    MetricsSnapshot,
    StageWork,
    TierMoves,
    TierState,
)

__all__ = [
    "DeviceMemory",
    "KVPages",
    "LendingState",
    "MetricsRegistry",
    "MetricsServer",
    "MetricsSnapshot",
    "StageWork",
    "TierMoves",
    "TierState",
]
