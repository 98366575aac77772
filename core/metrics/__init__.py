"""Prometheus metrics: a registry fed by events and by snapshots, and the listener that serves it."""

from core.metrics.registry import MetricsRegistry
from core.metrics.server import MetricsServer
from core.metrics.snapshot import DeviceMemory, KVPages, MetricsSnapshot, StageWork

__all__ = ["DeviceMemory", "KVPages", "MetricsRegistry", "MetricsServer", "MetricsSnapshot", "StageWork"]
