"""Readers: every number of a quantized checkpoint means in the inner form what it means in its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantization.written import FORMATS
from safetensors.torch import load_file, save_file
from torch import nn

from core.errors import CheckpointError, InvalidRequestError, UnsupportedModelError
from core.models.architecture import read_architecture
from core.models.fit import checked_notes
from core.models.stage_model import StageSlice, load_stage, measure_bytes
from core.quantization.choice import QuantizeChoice
from core.quantization.linear import QuantLinear


def load(path: Path) -> Any:
    architecture = read_architecture(path)
    whole = StageSlice(0, architecture.num_layers, architecture.num_layers)
    return load_stage(architecture, path, whole, torch.device("cpu"), attention="eager")


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_read_exactly(name: str, tmp_path: Path) -> None:
    meant = FORMATS[name](tmp_path)
    assert checked_notes(tmp_path) == ()
    model = load(tmp_path)
    found = {key: module for key, module in model.named_modules() if isinstance(module, QuantLinear)}
    expected = {key: module for key, module in meant.named_modules() if isinstance(module, nn.Linear)}
    assert found.keys() == expected.keys() - {"lm_head"}
    for key, module in found.items():
        torch.testing.assert_close(module.weight, expected[key].weight, rtol=2e-7, atol=1e-7)
    held = {id(t): t.nbytes for layer in model.model.layers for t in (*layer.parameters(), *layer.buffers())}
    assert sum(held.values()) == sum(measure_bytes(read_architecture(tmp_path)).layers)


@pytest.mark.parametrize("name", ["gptq 4 bits, 64", "awq 128", "compressed int4 32", "nf4", "hqq 4 bits, 64"])
def test_int4_layers_stay_small(name: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path)
    architecture = read_architecture(tmp_path)
    linears = [module for key, module in architecture.quantization.modules.items()]  # type: ignore[union-attr]
    held = sum(module.form.nbytes(module.n, module.k) for module in linears)
    assert held <= 0.32 * 2 * sum(module.n * module.k for module in linears)


def change(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= changes
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("gptq 4 bits, 64", {"bits": 5}, "GPTQ with 5 bits"),
        ("gptq 4 bits, 64", {"checkpoint_format": "marlin"}, "the format 'marlin'"),
        ("awq 64", {"version": "gemv"}, "AWQ with 4 bits in the gemv layout"),
        ("compressed int4 64", {"format": "nvfp4-pack-quantized"}, "the format 'nvfp4-pack-quantized'"),
        ("nf4", {"bnb_4bit_quant_type": "fp4"}, "bitsandbytes' fp4"),
        ("hqq 4 bits, 64", {"quant_config": {"weight_quant_params": {"nbits": 3, "group_size": 64}}}, "3 bits"),
        ("fp8 blocks", {"quant_method": "mxfp4"}, r"quantized \(MXFP4\)"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused_by_name(name: str, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path)
    change(tmp_path, **changes)
    with pytest.raises(UnsupportedModelError, match=said):
        read_architecture(tmp_path)


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path: Path) -> None:
    FORMATS["awq 64"](tmp_path)
    with pytest.raises(InvalidRequestError, match=r"quantized already \(AWQ, 4 bits, groups of 64\)") as refused:
        read_architecture(tmp_path, quantize=QuantizeChoice("int4", 64))
    assert refused.value.param == "quantize"


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("name", "edited", "said"),
    [
        ("gptq 4 bits, 64", {"scales": lambda t: t[:1]}, "its scale has the shape"),
        ("gptq 4 bits, 64", {"qweight": lambda t: t[:8]}, "qweight has the shape"),
        ("gptq 4 bits, 64", {"g_idx": lambda t: t.flip(0)}, "act-order"),
        ("gptq act-order", {"g_idx": lambda t: t * 0}, "does not give every group 32 columns"),
        ("awq 64", {"scales": lambda t: t * float("nan")}, "holds NaN or infinite numbers"),
        ("nf4", {"weight.quant_map": lambda t: t * 2}, "not that of nf4"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_belong_together_are_named(
    name: str, edited: dict[str, Callable[[torch.Tensor], torch.Tensor]], said: str, tmp_path: Path
) -> None:
    FORMATS[name](tmp_path)
    for part, change_part in edited.items():
        key = f"{UP}.{part}"
        edit(tmp_path, lambda tensors: tensors.update({key: change_part(tensors[key]).contiguous()}))  # noqa: B023
    with pytest.raises(CheckpointError, match=said) as refused:
        load(tmp_path)
    assert UP in str(refused.value)
