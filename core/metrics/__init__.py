"""Prometheus metrics: a registry fed by events and by the engine's state, and the listener that serves it."""

from core.metrics.registry import NAMESPACE, MetricsRegistry
from core.metrics.server import MetricsServer

__all__ = ["NAMESPACE", "MetricsRegistry", "MetricsServer"]
