"""bf16 is served as fp16 where a card has no bf16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from plain_settings import make_settings
from tiny_models import build_tiny

from core.devices import Device
from core.devices.device import DeviceKind
from core.engine.model_plan import measure_with, plan_model
from core.errors import DeviceError
from core.inference_pipeline import InferencePipeline
from core.models.dtype import compute_capability, served_architecture, supports_bf16
from core.models.resolve import resolve_model
from core.request import SamplingParams
from core.transfer import TransferManager
from core.views.status import pipeline_view

CARDS = {"cuda:0": (8, 6), "cuda:1": (7, 5)}


@pytest.mark.parametrize(
    ("kind", "capability", "expected"),
    [("cuda", 75, False), ("cuda", 70, False), ("cuda", 80, True), ("cuda", 120, True), ("rocm", None, True),
     ("mps", None, True), ("cpu", None, True), ("sim", None, True)],
)  # fmt: skip
def test_who_has_bf16(kind: DeviceKind, capability: int | None, expected: bool) -> None:
    assert supports_bf16(kind, capability) is expected


def test_capability_is_of_nvidia_cards_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: CARDS[str(device)])
    assert compute_capability(torch.device("cuda:0")) == 86 and compute_capability(torch.device("cpu")) is None
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert compute_capability(torch.device("cuda:0")) is None


@pytest.fixture(scope="module")
def bf16_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    build_tiny("llama", path).to(torch.bfloat16).save_pretrained(path)
    return path


def devices(*names: str, kind: DeviceKind = "cuda") -> list[Device]:
    return [Device(name, index, kind, name, 1 << 26) for index, name in enumerate(names)]


def test_one_card_without_bf16_makes_it_fp16_everywhere(bf16_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: CARDS[str(device)])
    architecture, notes = served_architecture(bf16_model, "auto", devices("cuda:0"))
    assert architecture.dtype is torch.bfloat16 and notes == ()
    architecture, notes = served_architecture(bf16_model, "auto", devices("cuda:0", "cuda:1"))
    assert architecture.dtype is torch.float16
    assert len(notes) == 1 and "cuda:1 (compute capability 7.5)" in notes[0] and "cuda:0" not in notes[0]
    for dtype in ("float16", "float32"):
        architecture, notes = served_architecture(bf16_model, dtype, devices("cuda:1"))
        assert str(architecture.dtype) == f"torch.{dtype}" and notes == ()


def test_bf16_that_is_asked_for_is_refused_by_name(bf16_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: CARDS[str(device)])
    with pytest.raises(DeviceError, match=r"bfloat16 needs .* cuda:1 \(compute capability 7\.5\)\. Use float16"):
        served_architecture(bf16_model, "bfloat16", devices("cuda:0", "cuda:1"))
    assert served_architecture(bf16_model, "bfloat16", devices("cuda:0"))[0].dtype is torch.bfloat16


def test_the_plan_says_so(bf16_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.models.dtype.compute_capability", lambda device: 75)
    settings = make_settings(model__name=str(bf16_model))
    resolved, measure = resolve_model(str(bf16_model)), measure_with(settings, TransferManager())
    old = [Device("old", 0, "cuda", "cpu", 1 << 26)]
    plan = plan_model(resolved, old, settings, measure)
    assert plan.architecture.dtype is torch.float16 and "old" in plan.notes[0] and "float16" in plan.notes[0]
    new = plan_model(resolved, [Device("cpu", 0, "cpu", "cpu", 1 << 26)], settings, measure)
    assert new.architecture.dtype is torch.bfloat16 and new.notes == ()


def test_what_is_served_is_fp16_and_the_status_says_so(
    bf16_model: Path, monkeypatch: pytest.MonkeyPatch, open_pipeline: Callable[..., InferencePipeline]
) -> None:
    monkeypatch.setattr("core.models.dtype.supports_bf16", lambda kind, capability: False)
    pipeline = open_pipeline(bf16_model, engine__kv_cache_tokens=256)
    assert pipeline.engine.model.dtype == "float16"
    assert pipeline.engine.stages[0].kv is not None and pipeline.engine.stages[0].kv.dtype is torch.float16
    (note,) = pipeline_view(pipeline.current_engine, pipeline.state()).notes
    assert "float16 in place of bfloat16, which cpu" in note
    asked = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    (answer,) = pipeline.submit([5, 6, 7], asked).result().completions
    assert len(answer.token_ids) == 3
