"""Ways to have requests arrive together, to act between steps and to wait, that give the same on a slow machine."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest

from core.batching.batcher import ContinuousBatcher
from core.inference_pipeline import InferencePipeline
from core.request import RequestOutput

LONGEST_WAIT_S = 300.0
"""What never takes that long is broken; no test waits for it otherwise."""


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for the condition; fails if it does not come true."""
    deadline_s = time.monotonic() + LONGEST_WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"in vain: {what}"
        time.sleep(0.005)


@contextmanager
def arriving_together(pipeline: InferencePipeline) -> Iterator[None]:
    """What is submitted meanwhile reaches the scheduler at once: the engine thread waits until all of it is there."""
    gate = threading.Event()
    held = pipeline.engine.batcher.call(gate.wait)
    try:
        yield
    finally:
        gate.set()
        held.result(LONGEST_WAIT_S)


@contextmanager
def with_each_step(pipeline: InferencePipeline, act: Callable[[], object]) -> Iterator[None]:
    """`act` on the engine thread whenever a step has been scheduled, before it runs. What it raises ends the engine."""
    scheduler = pipeline.engine.batcher.scheduler
    schedule = scheduler.schedule

    def schedule_and_act(*args: Any) -> Any:
        output = schedule(*args)
        if output is not None:
            act()
        return output

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(scheduler, "schedule", schedule_and_act)
        yield


@contextmanager
def between_steps(pipeline: InferencePipeline, act: Callable[[], object]) -> Iterator[None]:
    """`act` on the engine thread after every step, when none is in flight. What it raises is raised at the end."""
    calls: list[Future[object]] = []
    with with_each_step(pipeline, lambda: calls.append(pipeline.engine.batcher.call(act))):
        yield
    for call in calls:
        call.result(LONGEST_WAIT_S)


class OnEngineThread(queue.SimpleQueue):  # type: ignore[type-arg]
    """A sink that looks at every message in the thread that puts it, so that nothing moves on meanwhile."""

    def __init__(self, look: Callable[[RequestOutput], None]) -> None:
        self._look = look

    def put(self, item: tuple[int, RequestOutput]) -> None:
        self._look(item[1])
        super().put(item)


class Brake:
    """Lets the engine that serves take so many steps as it is given, and wait for more."""

    def __init__(self, pipeline: InferencePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = 0
        fill = ContinuousBatcher._fill

        def braked(batcher: ContinuousBatcher) -> None:
            if batcher is not pipeline.engine.batcher or not batcher.scheduler.has_work:
                fill(batcher)
            elif self.steps > 0:
                self.steps -= 1
                fill(batcher)
            else:
                time.sleep(0.001)

        monkeypatch.setattr(ContinuousBatcher, "_fill", braked)

    def go_on(self, steps: int) -> None:
        """Wait until these have been taken."""
        self.steps = steps
        until(lambda: self.steps <= 0, "the engine takes its steps")
