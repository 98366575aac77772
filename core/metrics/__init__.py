"""Prometheus metrics: a registry fed by events and by the engine's state."""

from core.metrics.registry import NAMESPACE, MetricsRegistry

__all__ = ["NAMESPACE", "MetricsRegistry"]
