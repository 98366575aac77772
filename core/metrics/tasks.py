"""`TaskLog`: background work, such as loading a model: what runs, what ran lately, and the `tasks_*` metrics.

A task is never a request for an answer. Whoever does the work says so around it::

    with metrics.tasks.run("load", "owner/name"):
        ...
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from core.errors import VRAMancerError
from core.metrics.names import NAMESPACE
from core.metrics.recent import percentiles

Priority = Literal["low", "normal", "high"]
Resource = Literal["devices", "memory", "disk"]
Status = Literal["running", "completed", "refused", "failed"]

RESOURCES: tuple[Resource, ...] = ("devices", "memory", "disk")
BUCKETS_S = (0.01, 0.1, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0)
KEPT_TASKS = 50
KEPT_DURATIONS = 256
"""Of each priority and outcome, that percentiles are taken over."""


@dataclass(frozen=True, slots=True)
class Task:
    """One piece of work. `kind` says what is done, `detail` with what; `resource` is what it occupies. `started_at` is
    Unix time; `seconds` is how long it has taken so far, or took; `error` why it was refused or failed."""

    id: int
    kind: str
    detail: str
    priority: Priority
    resource: Resource
    status: Status
    started_at: float
    seconds: float
    error: str | None = None


class TaskLog(Collector):
    """Thread-safe. `clock` gives seconds, never going back. `watch` is what else is put around each task's work."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.watch: Callable[[Task], AbstractContextManager[object]] = nullcontext
        self._clock = clock
        self._lock = threading.Lock()
        self._ids = count(1)
        self._running: dict[int, tuple[Task, float]] = {}
        self._recent: deque[Task] = deque(maxlen=KEPT_TASKS)
        self._submitted = 0
        self._ended: Counter[Status] = Counter()
        self._durations: dict[tuple[Priority, Status], _Durations] = {}

    @contextmanager
    def run(
        self,
        kind: str,
        detail: str = "",
        *,
        priority: Priority = "normal",
        resource: Resource = "devices",
        asked: bool = True,
    ) -> Iterator[None]:
        """Around the work. What it raises makes it a failed task, or a refused one if a client `asked` for the work and
        the error is about what was asked: nobody has to be woken for a name with a typing error."""
        began_s = self._clock()
        with self._lock:
            task = Task(next(self._ids), kind, detail, priority, resource, "running", time.time(), 0.0)
            self._submitted += 1
            self._running[task.id] = task, began_s
        error: str | None = "it was given up"
        status: Status = "failed"
        try:
            with self.watch(task):
                yield
            status, error = "completed", None
        except Exception as failure:
            error = str(failure) or type(failure).__name__
            if asked and isinstance(failure, VRAMancerError) and failure.status < 500:
                status = "refused"
            raise
        finally:
            seconds = self._clock() - began_s
            with self._lock:
                del self._running[task.id]
                self._recent.append(replace(task, status=status, seconds=round(seconds, 3), error=error))
                self._ended[status] += 1
                self._durations.setdefault((priority, status), _Durations()).add(seconds)

    def running(self) -> tuple[Task, ...]:
        """What runs now, oldest first."""
        with self._lock:
            held = list(self._running.values())
        now_s = self._clock()
        return tuple(replace(task, seconds=round(now_s - began_s, 3)) for task, began_s in held)

    def recent(self) -> tuple[Task, ...]:
        """What ended lately, last first."""
        with self._lock:
            return tuple(reversed(self._recent))

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            submitted, ended = self._submitted, dict(self._ended)
            running = [task.resource for task, _ in self._running.values()]
            durations = {key: each.snapshot() for key, each in self._durations.items()}
        yield CounterMetricFamily(f"{NAMESPACE}_tasks_submitted", "Background tasks begun.", value=submitted)
        help_text = "Background tasks that did what they were to do."
        yield CounterMetricFamily(f"{NAMESPACE}_tasks_completed", help_text, value=ended.get("completed", 0))
        help_text = "Background tasks that were not done because of what was asked for, such as an unknown model."
        yield CounterMetricFamily(f"{NAMESPACE}_tasks_refused", help_text, value=ended.get("refused", 0))
        help_text = "Background tasks that failed."
        yield CounterMetricFamily(f"{NAMESPACE}_tasks_failed", help_text, value=ended.get("failed", 0))
        yield GaugeMetricFamily(f"{NAMESPACE}_tasks_running", "Background tasks under way.", value=len(running))
        help_text = "Background tasks under way, by what they occupy."
        by_resource = GaugeMetricFamily(f"{NAMESPACE}_tasks_resource_running", help_text, labels=["resource"])
        for resource in RESOURCES:
            by_resource.add_metric([resource], running.count(resource))
        yield by_resource
        yield from _duration_metrics(durations)


@dataclass(slots=True)
class _Snapshot:
    """Counts up to each of `BUCKETS_S` and beyond, the sum of all, and the last ones."""

    buckets: list[int]
    total_s: float
    last: list[float]


class _Durations:
    def __init__(self) -> None:
        self._buckets = [0] * (len(BUCKETS_S) + 1)
        self._total_s = 0.0
        self._last: deque[float] = deque(maxlen=KEPT_DURATIONS)

    def add(self, seconds: float) -> None:
        for index, bound in enumerate((*BUCKETS_S, float("inf"))):
            self._buckets[index] += seconds <= bound
        self._total_s += seconds
        self._last.append(seconds)

    def snapshot(self) -> _Snapshot:
        return _Snapshot(list(self._buckets), self._total_s, list(self._last))


def _duration_metrics(durations: dict[tuple[Priority, Status], _Snapshot]) -> Iterator[Metric]:
    labels = ["priority", "status"]
    help_text = "How long background tasks took."
    whole = HistogramMetricFamily(f"{NAMESPACE}_task_duration_seconds", help_text, labels=labels)
    help_text = f"Percentiles of the last {KEPT_DURATIONS} background tasks' durations, in seconds."
    parts = GaugeMetricFamily(f"{NAMESPACE}_task_duration_percentile", help_text, labels=[*labels, "percentile"])
    for key, found in durations.items():
        bounds = [*map(str, BUCKETS_S), "+Inf"]
        whole.add_metric(key, list(zip(bounds, found.buckets, strict=True)), found.total_s)
        for percentile, seconds in percentiles(found.last).items():
            parts.add_metric([*key, str(percentile)], seconds)
    yield whole
    yield parts
