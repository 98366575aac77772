"""Fixtures of the cluster's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster.machines import WorkerThread, joined, open_master, open_worker, worker_settings
from plain_settings import CACHE_DIR, make_settings
from tiny_models import build_tiny

from core.cluster.master import Master
from core.inference_pipeline import InferencePipeline


@pytest.fixture
def master() -> Iterator[Master]:
    made = open_master()
    yield made
    made.close()


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    build_tiny("llama", path)
    return path


@pytest.fixture
def add_worker(master: Master) -> Iterator[Callable[..., WorkerThread]]:
    workers: list[WorkerThread] = []

    def add(
        name: str, devices: str = "cpu=64MiB", keeps: int | None = None, lends: int = 0, **given: Any
    ) -> WorkerThread:
        before = len(master.nodes)
        settings = worker_settings(CACHE_DIR, devices, keeps, lends)
        workers.append(WorkerThread(open_worker(master, settings, name, **given)))
        if not given:
            joined(master, before + 1)
        return workers[-1]

    yield add
    for worker in workers:
        worker.close()


@pytest.fixture
def serve(master: Master, tiny_llama: Path) -> Iterator[Callable[..., InferencePipeline]]:
    opened: list[InferencePipeline] = []

    def start(**overrides: Any) -> InferencePipeline:
        defaults = {
            "model__name": str(tiny_llama), "devices__placement": "balanced", "devices__profile_seconds": 0.02,
            "runtime__cache_dir": CACHE_DIR, "engine__kv_cache_tokens": 2048,
        }  # fmt: skip
        pipeline = InferencePipeline(make_settings(**{**defaults, **overrides}), cluster=master)
        opened.append(pipeline)
        pipeline.load()
        return pipeline

    yield start
    for pipeline in opened:
        engine = pipeline.current_engine
        if engine is not None and engine.batcher.alive:
            engine.check_invariants()
        pipeline.shutdown()
