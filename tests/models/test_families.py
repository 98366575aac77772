"""Models planned by the arithmetic of their families: as their own classes have it, without importing those."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from core.models.architecture import read_architecture
from core.models.families import _FAMILIES, read_family
from core.models.stage_model import measure_bytes
from core.profiling.workspace import measure_workspace
from core.quantization.choice import QuantizeChoice

CONFIG = {
    "hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "vocab_size": 4000, "num_hidden_layers": 4, "max_position_embeddings": 4096, "num_local_experts": 8,
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "pad_token_id": None, "bos_token_id": 1,
    "eos_token_id": 2, "dtype": "bfloat16",
}  # fmt: skip
TOKENS, ROWS = 512, 32


def write(folder: Path, family: str, **changed: Any) -> Path:
    """A config as transformers writes it."""
    CONFIG_MAPPING[family].from_dict({**CONFIG, **changed}).save_pretrained(folder)
    return folder


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in sorted(_FAMILIES)),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True}),
    ("qwen3", {"num_attention_heads": 8, "intermediate_size": 512, "attention_bias": True}),
    ("gemma3_text", {"tie_word_embeddings": False}),
    ("mixtral", {"num_experts_per_tok": 4}),
    ("qwen2", {"vocab_size": 60_000}),
]


@pytest.mark.parametrize(
    ("family", "changed"), VARIANTS, ids=[f"{name}{index}" for index, (name, _) in enumerate(VARIANTS)]
)
def test_a_familys_arithmetic_is_what_its_class_has(tmp_path: Path, family: str, changed: dict[str, Any]) -> None:
    found = read_family(write(tmp_path, family, **changed))
    assert found is not None, (tmp_path / "config.json").read_text()
    architecture = read_architecture(tmp_path)
    wanted = measure_bytes(architecture)
    dtype = str(architecture.dtype).removeprefix("torch.")
    assert found.dtype == dtype
    ours = found.weights(dtype)
    for part in ("layers", "after", "head", "tied", "num_parameters", "layer_parameters", "head_parameters", "experts"):
        assert getattr(ours, part) == getattr(wanted, part), part
    assert ours.embedding == pytest.approx(wanted.embedding, abs=1024), "a table of frequencies more or less"
    element = architecture.dtype.itemsize
    assert found.kv_bytes_per_token(dtype) == tuple(each.bytes_per_token(element) for each in architecture.kv_shapes)
    assert found.max_position == architecture.max_position
    assert found.hidden_size == architecture.hidden_size
    workspace = measure_workspace(architecture, TOKENS, ROWS, wanted.experts)
    assert workspace is not None
    assert found.workspace(dtype, TOKENS, ROWS).layers_bytes == pytest.approx(workspace.layers_bytes, rel=0.03)
    assert found.workspace(dtype, TOKENS, ROWS).head_bytes == pytest.approx(workspace.head_bytes, rel=0.03)


WIDE = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4,
    "moe_intermediate_size": 384,
}  # fmt: skip
QUANTIZED: list[tuple[str, dict[str, Any], QuantizeChoice]] = [
    *((family, WIDE, QuantizeChoice("int4", 64, ("head",))) for family in sorted(_FAMILIES)),
    *((family, {}, QuantizeChoice("int8", 128, ("head",))) for family in ("llama", "phi3", "gemma2", "gpt_oss")),
    ("llama", {**WIDE, "tie_word_embeddings": True, "attention_bias": True}, QuantizeChoice("int8", 64)),
    ("qwen2", WIDE, QuantizeChoice("int4", 128, ("model.layers.0.*", "model.layers.3.mlp.*"))),
    ("qwen2", WIDE, QuantizeChoice("int4", 256, ("head", "down_proj", "*up_proj"))),
]


@pytest.mark.parametrize(
    ("family", "changed", "quantize"), QUANTIZED, ids=[f"{each[0]}{index}" for index, each in enumerate(QUANTIZED)]
)
def test_what_is_quantized_on_load_is_known_too(
    tmp_path: Path, family: str, changed: dict[str, Any], quantize: QuantizeChoice
) -> None:
    found = read_family(write(tmp_path, family, **changed), "auto", quantize)
    assert found is not None
    architecture = read_architecture(tmp_path, quantize=quantize)
    ours, wanted = found.weights(found.dtype), measure_bytes(architecture)
    for part in ("layers", "after", "head", "tied", "num_parameters", "layer_parameters", "head_parameters", "experts"):
        assert getattr(ours, part) == getattr(wanted, part), part
    assert ours.embedding == pytest.approx(wanted.embedding, abs=1024), "a table of frequencies more or less"
    workspace = measure_workspace(architecture, TOKENS, ROWS, wanted.experts)
    assert workspace is not None
    assert found.workspace(found.dtype, TOKENS, ROWS).layers_bytes == pytest.approx(workspace.layers_bytes, rel=0.05)


@pytest.mark.parametrize(
    ("changed", "quantize"),
    [({"intermediate_size": 690}, QuantizeChoice("int4", 64)), ({}, QuantizeChoice("int8", 64, ("head", "*_proj")))],
)
def test_what_cannot_be_quantized_is_left_to_the_models_class(
    tmp_path: Path, changed: dict[str, Any], quantize: QuantizeChoice
) -> None:
    write(tmp_path, "llama", **changed)
    assert read_family(tmp_path) is not None
    assert read_family(tmp_path, "auto", quantize) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"model_type": "gpt2"},
        {"model_type": ["llama"]},
        {"hidden_size": "256"},
        {"hidden_size": 0},
        {"num_hidden_layers": True},
        {"num_key_value_heads": 3},
        {"num_key_value_heads": None},
        {"hidden_act": "nope"},
        {"quantization_config": {"quant_method": "awq"}},
        {"layer_types": ["full_attention"]},
        {"layer_types": ["linear_attention"] * 4},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"rope_scaling": "twice"},
        {"dtype": "int4"},
        {"tie_word_embeddings": "no"},
        {"hidden_act": ["silu"]},
        {"layer_types": 5},
        {"layer_types": [["full_attention"]] * 4},
        {"rope_scaling": {"rope_type": ["yarn"]}},
        {"partial_rotary_factor": float("nan")},
        {"partial_rotary_factor": -1},
        {"num_hidden_layers": 10**9},
        {"hidden_size": 2**40},
    ],
)
def test_what_is_not_plain_is_left_to_the_models_class(tmp_path: Path, changed: dict[str, Any]) -> None:
    write(tmp_path, "llama")
    assert read_family(tmp_path) is not None
    config = json.loads((tmp_path / "config.json").read_text()) | changed
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_family(tmp_path) is None


def test_more_experts_than_any_model_has_are_not_counted(tmp_path: Path) -> None:
    write(tmp_path, "mixtral")
    config = json.loads((tmp_path / "config.json").read_text())
    for experts, plain in ((8, True), (10**6, False)):
        (tmp_path / "config.json").write_text(json.dumps({**config, "num_local_experts": experts}))
        assert (read_family(tmp_path) is not None) == plain


def test_an_old_name_of_the_dtype_is_read_where_the_new_one_is_null(tmp_path: Path) -> None:
    write(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": None, "torch_dtype": "float16"}))
    found = read_family(tmp_path)
    assert found is not None and found.dtype == "float16"


def test_files_may_have_what_the_config_does_not_tell(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    write(tmp_path, "llama", tie_word_embeddings=True)
    save_file({"model.norm.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert read_family(tmp_path) is not None
    save_file({"lm_head.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert read_family(tmp_path) is None, "the head may not be the embedding"
    write(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_family(tmp_path) is None, "the files say in which dtype they are"
    (tmp_path / "model.safetensors").unlink()
    found = read_family(tmp_path)
    assert found is not None and found.dtype == "float32"


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_a_plan_for_cards_imports_neither_torch_nor_transformers(tmp_path: Path, family: str) -> None:
    write(tmp_path, family)
    program = (
        "import sys\nfrom vramancer.cli import app\n"
        "try:\n    app(['plan', sys.argv[1], '--gpu', '3090', '--gpu', '5070 Ti', '--log-level', 'error'])\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "print(sorted({'torch', 'transformers'} & sys.modules.keys()))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("Fits.")
    assert ended.stdout.splitlines()[-1] == "[]"
