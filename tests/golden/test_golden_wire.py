"""The golden tests once more, with every record encoded and decoded between the scheduler and the stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_golden_architectures import (
    reference,
    test_arrivals_prefix_hits_and_forks,
    test_chunked_prefill_and_forced_preemption,
)
from wired import Wired, wire

from core.inference_pipeline import InferencePipeline

__all__ = ["reference", "test_arrivals_prefix_hits_and_forks", "test_chunked_prefill_and_forced_preemption"]


@pytest.fixture
def open_pipeline(open_pipeline: Callable[..., InferencePipeline]) -> Iterator[Callable[..., InferencePipeline]]:
    stages: list[Wired] = []

    def start(model: Path | None = None, **overrides: Any) -> InferencePipeline:
        pipeline = open_pipeline(model, **overrides)
        stages.extend(wire(pipeline.engine))
        return pipeline

    yield start
    assert all(stage.records for stage in stages), "every stage has heard of steps over its wire"
