"""Background work is counted while it runs and when it ends, well or not."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest
from prometheus_client import CollectorRegistry

from core.errors import ModelNotFoundError, OutOfDeviceMemoryError
from core.metrics import TaskLog


@pytest.fixture
def seconds() -> Iterator[int]:
    return count(100)


@pytest.fixture
def log(seconds: Iterator[int]) -> TaskLog:
    return TaskLog(clock=lambda: float(next(seconds)))


def value(log: TaskLog, name: str, **labels: str) -> float | None:
    registry = CollectorRegistry()
    registry.register(log)
    return registry.get_sample_value(f"vramancer_{name}", labels)


def test_a_task_that_runs(log: TaskLog) -> None:
    with log.run("load", "owner/name", resource="devices"):
        (task,) = log.running()
        assert (task.kind, task.detail, task.priority, task.resource, task.status) == (
            "load", "owner/name", "normal", "devices", "running"
        )  # fmt: skip
        assert task.seconds == 1.0
        assert (value(log, "tasks_submitted_total"), value(log, "tasks_running")) == (1, 1)
        assert value(log, "tasks_resource_running", resource="devices") == 1
        assert value(log, "tasks_resource_running", resource="memory") == 0
        assert value(log, "tasks_completed_total") == 0
    assert log.running() == ()
    assert value(log, "tasks_running") == 0


def test_a_task_that_did_what_it_should(log: TaskLog) -> None:
    with log.run("load", "owner/name"):
        pass
    (task,) = log.recent()
    assert (task.status, task.seconds, task.error) == ("completed", 1.0, None)
    assert (value(log, "tasks_completed_total"), value(log, "tasks_failed_total")) == (1, 0)
    labels = {"priority": "normal", "status": "completed"}
    assert value(log, "task_duration_seconds_count", **labels) == 1
    assert value(log, "task_duration_seconds_sum", **labels) == 1.0
    assert value(log, "task_duration_seconds_bucket", le="1.0", **labels) == 1
    assert value(log, "task_duration_seconds_bucket", le="0.1", **labels) == 0


def test_a_task_that_failed_says_why(log: TaskLog) -> None:
    with pytest.raises(ValueError, match="no room"), log.run("recovery", "x", priority="high"):
        raise ValueError("no room")
    (task,) = log.recent()
    assert (task.status, task.error) == ("failed", "no room")
    assert (value(log, "tasks_completed_total"), value(log, "tasks_failed_total")) == (0, 1)
    assert value(log, "task_duration_seconds_count", priority="high", status="failed") == 1


def test_what_was_asked_for_wrongly_is_refused_and_is_no_failure(log: TaskLog) -> None:
    for asked, error in ((True, ModelNotFoundError("no such model")), (True, OutOfDeviceMemoryError("full"))):
        with pytest.raises(type(error)), log.run("load", "x", asked=asked):
            raise error
    with pytest.raises(ModelNotFoundError), log.run("recovery", "x", asked=False):
        raise ModelNotFoundError("gone")
    assert [(task.status, task.error) for task in log.recent()] == [
        ("failed", "gone"), ("failed", "full"), ("refused", "no such model")
    ]  # fmt: skip
    assert (value(log, "tasks_refused_total"), value(log, "tasks_failed_total")) == (1, 2)
    assert value(log, "task_duration_seconds_count", priority="normal", status="refused") == 1


def test_a_task_that_was_interrupted_has_failed(log: TaskLog) -> None:
    with pytest.raises(KeyboardInterrupt), log.run("load"):
        raise KeyboardInterrupt
    assert log.recent()[0].status == "failed"
    assert log.running() == ()


def test_percentiles_of_durations() -> None:
    times = iter([time for seconds in range(1, 101) for time in (0.0, float(seconds))])
    log = TaskLog(clock=lambda: next(times))
    for _ in range(100):
        with log.run("load"):
            pass
    labels = {"priority": "normal", "status": "completed"}
    found = [value(log, "task_duration_percentile", percentile=p, **labels) for p in ("50", "95", "99")]
    assert found == [50.0, 95.0, 99.0]


def test_the_last_ones_are_kept(log: TaskLog) -> None:
    for number in range(60):
        with log.run("load", str(number)):
            pass
    assert [task.detail for task in log.recent()] == [str(number) for number in range(59, 9, -1)]
    assert value(log, "tasks_submitted_total") == 60
