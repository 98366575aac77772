"""The golden tests once more, with stages on other nodes: every step, every hidden state and every result crosses a
socket."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster.nodes import Nodes, move_to_nodes
from test_golden_architectures import (
    Reference,
    make_reference,
    test_arrivals_prefix_hits_and_forks,
    test_chunked_prefill_and_forced_preemption,
)

from core.inference_pipeline import InferencePipeline

__all__ = ["test_arrivals_prefix_hits_and_forks", "test_chunked_prefill_and_forced_preemption"]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(params=["all", "first", "last"])
def open_pipeline(
    open_pipeline: Callable[..., InferencePipeline], request: pytest.FixtureRequest
) -> Iterator[Callable[..., InferencePipeline]]:
    opened: list[Nodes] = []

    def start(model: Path | None = None, **overrides: Any) -> InferencePipeline:
        pipeline = open_pipeline(model, **overrides)
        count = len(pipeline.engine.stages)
        which = {"all": range(count), "first": [0], "last": [count - 1]}[request.param]
        opened.append(move_to_nodes(pipeline.engine, which))
        return pipeline

    yield start
    for nodes in opened:
        assert all(link.stats.sent_frames for link in nodes.links.values()), "every node has heard of steps"
        assert not nodes.lost
        nodes.close()
