"""Shared fixtures. Every test must leave no engine thread, process or listening socket behind."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import psutil
import pytest
import structlog
import torch
import transformers
from plain_settings import CACHE_DIR, make_settings

from core.inference_pipeline import InferencePipeline
from core.models import chat_template

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def _engine_threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("vrm-")}


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Threads and child processes that a test starts end with it (module-wide fixtures keep theirs until then)."""
    threads, children = _engine_threads(), {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    left = sorted(_engine_threads() - threads)
    assert not left or "shared_pipelines" in request.fixturenames, f"threads left behind: {left}"
    known = children | chat_template.worker_pids()  # which are kept, and end with this process
    orphans = [child for child in psutil.Process().children(recursive=True) if child.pid not in known]
    assert not orphans, f"processes left behind: {orphans}"


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Programs that are run in the process configure the root logger."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    for handler in list(root.handlers):
        if isinstance(handler.formatter, structlog.stdlib.ProcessorFormatter) and handler not in handlers:
            root.removeHandler(handler)


@pytest.fixture
def open_pipeline() -> Iterator[Callable[..., InferencePipeline]]:
    """Start pipelines on logical CPU devices; each is audited and shut down at the end of the test."""
    opened: list[InferencePipeline] = []

    def start(model: Path | None = None, **overrides: object) -> InferencePipeline:
        defaults = {
            "devices__devices": "cpu=64MiB",
            "devices__placement": "vram",  # a model that fits into one device would be placed on one
            "devices__profile_seconds": 0.02,
            "runtime__cache_dir": CACHE_DIR,
        }
        named = {} if model is None else {"model__name": str(model)}
        pipeline = InferencePipeline(make_settings(**{**defaults, **named, **overrides}))
        opened.append(pipeline)
        pipeline.load()
        return pipeline

    yield start
    for pipeline in opened:
        if pipeline.current_engine is not None and pipeline.current_engine.batcher.alive:
            pipeline.current_engine.check_invariants()
        pipeline.shutdown()
