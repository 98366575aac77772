"""A model is swapped in with quantized weights by `POST /api/models/load`, or refused before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from quantization import written
from steering import LONGEST_WAIT_S
from tiny_models import build_tiny

from core.api import create_app
from core.engine.builder import EngineBuilder
from core.inference_pipeline import InferencePipeline
from core.quantization.swap import quantized_modules
from core.request import SamplingParams

TOKEN = "a-token-for-tests"
OpenPipeline = Callable[..., InferencePipeline]


@pytest.fixture
def served(tmp_path: Path, open_pipeline: OpenPipeline) -> InferencePipeline:
    """A server whose settings say int8, and checkpoints below `tmp_path`: plain, odd, awq."""
    build_tiny("llama", tmp_path / "plain", **written.SHAPE)
    build_tiny("llama", tmp_path / "odd", intermediate_size=52)
    written.awq(tmp_path / "awq", group=64)
    return open_pipeline(tmp_path / "plain", model__quantize="int8", api__token=TOKEN)


def load(pipeline: InferencePipeline, path: Path, **fields: Any) -> Any:
    client = create_app(pipeline).test_client()
    return client.post("/api/models/load", json={"model": str(path), **fields}, headers={"X-API-TOKEN": TOKEN})


def titles(pipeline: InferencePipeline) -> set[str]:
    """Of all quantized modules that are there."""
    return {module.form.title for stage in pipeline.engine.stages for module in quantized_modules(stage._model)}


def test_what_a_load_asks_for_goes_before_the_settings(served: InferencePipeline, tmp_path: Path) -> None:
    assert titles(served) == {"int8, groups of 128"}
    plain = served.engine.plan.weights
    for fields, found, said in (
        ({"quantize": "int4"}, {"int4, groups of 64"}, "int4, groups of 64"),
        ({"quantize": "int4", "quantize_group": 32}, {"int4, groups of 32"}, "int4, groups of 32"),
        ({}, {"int8, groups of 128"}, "int8, groups of 128"),
        ({"quantize": "none"}, set(), ""),
    ):  # fmt: skip
        response = load(served, tmp_path / "plain", **fields)
        assert response.status_code == 200, response.text
        assert response.get_json()["quantization"] == said
        assert titles(served) == found
        params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True, detokenize=False)
        assert len(served.submit([5, 6], params).result(LONGEST_WAIT_S).completions[0].token_ids) == 3
    assert sum(plain.layers) < sum(served.engine.plan.weights.layers)


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("awq", {"quantize": "int4"}, "awq is quantized already (AWQ, 4 bits, groups of 64)"),
        ("awq", {}, "awq is quantized already"),  # as the settings say
        ("odd", {"quantize": "int4"}, "down_proj has 52 columns; int4 takes multiples of 8"),
    ],
)
def test_what_does_not_fit_the_checkpoint_is_refused(
    name: str, fields: dict[str, str], said: str, served: InferencePipeline, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    engine = served.engine
    monkeypatch.setattr(EngineBuilder, "__init__", lambda *_, **__: pytest.fail("memory is taken"))
    response = load(served, tmp_path / name, **fields)
    assert response.status_code == 400, response.text
    error = response.get_json()["error"]
    assert error["param"] == "quantize" and error["type"] in ("invalid_request_error", "model_error")
    assert said in error["message"]
    assert served.engine is engine


def test_a_quantized_checkpoint_loads_without(served: InferencePipeline, tmp_path: Path) -> None:
    """On a server whose settings quantize."""
    assert load(served, tmp_path / "awq", quantize="none").status_code == 200
    assert served.model.quantization == "AWQ, 4 bits, groups of 64"
