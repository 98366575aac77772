"""Quantizing on load: which layers, how well, and what plans say of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_settings import make_settings
from quantization import written
from tiny_models import build_tiny

from core.engine.preview import preview
from core.errors import CheckpointError, UnsupportedModelError
from core.models.architecture import read_architecture
from core.models.stage_model import StageSlice, load_stage, measure_bytes
from core.quantization.choice import QuantizeChoice
from core.quantization.quantize import quantize

INT8, INT4 = QuantizeChoice("int8", 32, ("head",)), QuantizeChoice("int4", 64, ("head",))


def error(weight: torch.Tensor, choice: QuantizeChoice) -> float:
    return float((quantize(weight, choice.form).dequantize() - weight).abs().max())


def test_int8_is_as_near_as_its_scale_allows() -> None:
    weight = torch.randn(33, 96, generator=torch.Generator().manual_seed(0))
    most = weight.view(33, 3, 32).abs().amax(-1) / 127
    off = (quantize(weight, INT8.form).dequantize() - weight).abs().view(33, 3, 32)
    assert bool((off <= 0.51 * most[..., None] + 1e-6).all())


def test_int4_is_searched() -> None:
    """Rounded to nearest within the range, errors of weights with heavy tails are larger in the norm that counts."""
    weight = torch.distributions.StudentT(3.0).sample((64, 256))
    grouped = weight.view(64, 4, 64)
    low, high = grouped.amin(-1, keepdim=True).clamp_max(0), grouped.amax(-1, keepdim=True).clamp_min(0)
    scale = (high - low) / 15
    zero = (-low / scale).round()
    nearest = (((grouped / scale + zero).round().clamp(0, 15) - zero) * scale).view(64, 256)
    found = quantize(weight, INT4.form).dequantize()
    assert float((found - weight).square().mean()) < 0.97 * float((nearest - weight).square().mean())


@pytest.mark.parametrize("choice", [INT8, INT4])
def test_odd_weights(choice: QuantizeChoice) -> None:
    zeros, tiny = torch.zeros(8, 64), torch.full((8, 64), 1e-9)
    assert error(zeros, choice) == 0
    assert error(tiny, choice) < 1e-6
    constant = torch.full((8, 72), -0.75)  # a short last group, and weights of one sign
    assert error(constant, choice) < 2e-3
    with pytest.raises(CheckpointError, match="too large"):
        quantize(torch.full((8, 64), 1e9), choice.form)
    with pytest.raises(CheckpointError, match="not finite"):
        quantize(torch.full((8, 64), float("nan")), choice.form)


def test_which_layers_are_taken() -> None:
    choice = QuantizeChoice("int4", 64, ("head", "down_proj", "model.layers.0.*"))
    taken = {
        name: choice.takes(name, is_head=name == "lm_head")
        for name in ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj", "model.layers.0.mlp.up_proj",
                     "model.layers.1.mlp.gate", "lm_head")
    }  # fmt: skip
    assert [name for name, is_taken in taken.items() if is_taken] == ["model.layers.1.mlp.up_proj"]
    assert QuantizeChoice.parse(choice.text) == choice
    assert QuantizeChoice.parse("") == QuantizeChoice()
    with pytest.raises(ValueError, match="no way to quantize"):
        QuantizeChoice.parse("int3:64")


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    build_tiny("gpt2", tmp_path)  # whose layers are transposed
    with pytest.raises(UnsupportedModelError, match="no linear layers that quantize=int4 covers"):
        read_architecture(tmp_path, quantize=QuantizeChoice("int4", 64, ("head",)))


def test_a_layer_that_cannot_be_quantized_is_named(tmp_path: Path) -> None:
    """Unless it is to stay as it is; int8 takes any number of columns."""
    build_tiny("llama", tmp_path, intermediate_size=52)
    with pytest.raises(UnsupportedModelError, match=r"down_proj has 52 columns; int4 takes multiples of 8") as refused:
        read_architecture(tmp_path, quantize=INT4)
    assert refused.value.param == "quantize"
    kept = read_architecture(tmp_path, quantize=QuantizeChoice("int4", 64, ("head", "down_proj"))).quantization
    whole = read_architecture(tmp_path, quantize=INT8).quantization
    assert kept is not None and whole is not None
    down = {name for name in whole.modules if name.endswith("down_proj")}
    assert len(down) == 4 and kept.modules.keys() == whole.modules.keys() - down


def resident_bytes(path: Path, choice: QuantizeChoice) -> list[int]:
    """Of each layer, in memory."""
    architecture = read_architecture(path, quantize=choice)
    part = StageSlice(0, architecture.num_layers, architecture.num_layers)
    model: Any = load_stage(architecture, path, part, torch.device("cpu"), attention="eager")
    return [sum(t.nbytes for t in (*layer.parameters(), *layer.buffers())) for layer in model.model.layers]


def test_int4_layers_take_less_than_a_third(tmp_path: Path) -> None:
    build_tiny("llama", tmp_path, dtype=torch.bfloat16, hidden_size=512, intermediate_size=1024, head_dim=128)
    plain, small = (measure_bytes(read_architecture(tmp_path, quantize=each)) for each in (QuantizeChoice(), INT4))
    assert resident_bytes(tmp_path, QuantizeChoice()) == list(plain.layers)
    assert resident_bytes(tmp_path, INT4) == list(small.layers)
    assert max(small.layers) <= 0.32 * min(plain.layers)
    assert small.num_parameters == plain.num_parameters and small.layer_parameters == plain.layer_parameters
    assert (small.embedding, small.head) == (plain.embedding, plain.head)


def test_plans_show_the_real_sizes(tmp_path: Path) -> None:
    """Also those of a quantized checkpoint of which only the config is there."""
    build_tiny("llama", tmp_path / "plain", hidden_size=128, intermediate_size=256, head_dim=32)
    written.gptq(tmp_path / "gptq", bits=4, group=32)
    (tmp_path / "config").mkdir()
    shutil.copy(tmp_path / "gptq" / "config.json", tmp_path / "config" / "config.json")

    def layers(name: str, **settings: object) -> int:
        shown = preview(make_settings(model__name=str(tmp_path / name), **settings), ["RTX 3090"])
        return sum(shown.problem.costs.layer_bytes)

    plain, int4 = layers("plain"), layers("plain", model__quantize="int4", model__quantize_group=32)
    architecture = read_architecture(tmp_path / "plain", quantize=QuantizeChoice("int4", 32, ("head",)))
    assert int4 == sum(measure_bytes(architecture).layers) < 0.2 * plain
    config = json.loads((tmp_path / "config" / "config.json").read_text())
    assert config["quantization_config"]["bits"] == 4
    assert layers("config") == layers("gptq") < 0.2 * plain
