"""From a prompt and its parameters to a request, and what is refused on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import build_tiny

from core.defaults import DEFAULT_OWNER
from core.inference_pipeline import InferencePipeline
from core.request import SamplingParams

GREEDY = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True, detokenize=False)


@pytest.fixture
def pipeline(open_pipeline: Callable[..., InferencePipeline], tmp_path: Path) -> InferencePipeline:
    build_tiny("llama", tmp_path)
    return open_pipeline(tmp_path)


def test_a_request_keeps_its_owner(pipeline: InferencePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, owners = pipeline.engine.batcher.submit, []

    def watched(requests: Any, **options: Any) -> Any:
        owners.extend(request.owner for request in requests)
        return submit(requests, **options)

    monkeypatch.setattr(pipeline.engine.batcher, "submit", watched)
    handles = pipeline.submit_many([([5, 6], GREEDY), ([7], GREEDY)], owner="somebody")
    handles += [pipeline.submit([5], GREEDY, owner="somebody else"), pipeline.submit([5], GREEDY)]
    for handle in handles:
        handle.result(30)
    assert owners == ["somebody", "somebody", "somebody else", DEFAULT_OWNER]
