"""From a prompt and its parameters to a request, and what is refused on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import build_tiny

from core.defaults import DEFAULT_OWNER
from core.errors import ContextLengthError
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


def test_a_model_answers_to_what_it_was_loaded_by(pipeline: InferencePipeline, tmp_path: Path) -> None:
    model = pipeline.model
    assert model.name == tmp_path.name
    for name in (model.name, str(tmp_path), f"{tmp_path}/", str(tmp_path).lstrip("/")):
        assert model.knows(name), name
    for name in ("", "/", str(tmp_path.parent), f"{model.name}x", f"x/{model.name}"):
        assert not model.knows(name), name


def test_a_hub_model_answers_to_its_short_name(pipeline: InferencePipeline) -> None:
    model = replace(pipeline.model, name="owner/name-7b", source="owner/name-7b", path=Path("/cache/snapshots/0a1b"))
    assert model.knows("owner/name-7b")
    assert model.knows("name-7b")
    assert not model.knows("owner")
    assert not model.knows("0a1b")


def test_a_relative_path_is_a_name_as_it_was_given(
    open_pipeline: Callable[..., InferencePipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_tiny("llama", tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    model = open_pipeline(Path("models/tiny")).model
    assert model.knows("models/tiny")
    assert model.knows("tiny")
    assert model.knows(str(tmp_path / "models" / "tiny"))


@pytest.mark.parametrize(("prompt", "max_tokens"), [(40, 1), (8, 60)])
def test_a_context_error_says_the_maximum_as_clients_look_for_it(
    open_pipeline: Callable[..., InferencePipeline], tmp_path: Path, prompt: int, max_tokens: int
) -> None:
    build_tiny("llama", tmp_path)
    short = open_pipeline(tmp_path, model__max_model_len=32)
    with pytest.raises(ContextLengthError, match=r"^This model's maximum context length is 32 tokens") as refused:
        short.submit([5] * prompt, replace(GREEDY, max_tokens=max_tokens))
    assert refused.value.error_code == "context_length_exceeded"
    assert str(prompt) in refused.value.message
