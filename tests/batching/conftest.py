"""Batchers over small schedulers; see `batcher_cases`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from batcher_cases import Bench, Clock, Open
from test_decisions import make_scheduler

from core.batching import batcher as batcher_module
from core.batching.scheduler import Scheduler


@pytest.fixture
def open_bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Benches, whose threads end with the test. Those of which memory was taken back have `backed` blocks."""
    opened: list[Bench] = []

    def start(scheduler: Scheduler | None = None, *, backed: int | None = None, cohorts: int = 1) -> Bench:
        bench = Bench(scheduler or make_scheduler(blocks=32), cohorts)
        monkeypatch.setattr(bench.kv.pages, "backed", lambda blocks: min(blocks, bench.backed))
        if backed is not None:
            bench.have_memory_for(backed)
        bench.batcher.start()
        opened.append(bench)
        return bench

    yield start
    for bench in opened:
        bench.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The batcher's own; and the batcher looks at it often."""
    clock = Clock()
    monkeypatch.setattr(batcher_module, "time", SimpleNamespace(monotonic=clock, sleep=time.sleep))
    monkeypatch.setattr(batcher_module, "UPKEEP_S", 0.001)
    return clock
