"""Prometheus metrics: a registry fed by events and by the engine's state."""

from core.metrics.names import COMING, NAMESPACE
from core.metrics.recent import Percentiles
from core.metrics.registry import MetricsRegistry
from core.metrics.tasks import Task, TaskLog

__all__ = ["COMING", "NAMESPACE", "MetricsRegistry", "Percentiles", "Task", "TaskLog"]
