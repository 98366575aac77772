"""`vramancer plan` and `vramancer bench`."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from core.config import iter_settings
from vramancer.cli import app


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for info in iter_settings():
        monkeypatch.delenv(info.env, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def plan_json(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["plan", *arguments, "--json", "--log-level", "error"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def plan_text(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments, "--log-level", "error"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of 14 billion parameters, of which only the config is there."""
    path = tmp_path_factory.mktemp("large") / "llama-14b"
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"], vocab_size=152064, hidden_size=5120, intermediate_size=13824,
        num_hidden_layers=48, num_attention_heads=40, num_key_value_heads=8, head_dim=128, dtype="bfloat16",
        max_position_embeddings=32768, tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(path)
    return str(path)


def test_a_plan_is_a_row_per_stage() -> None:
    text = plan_text("--placement", "balanced", "--gpu", "16GiB@900GB/s", "--gpu", "16GiB@450GB/s")
    for part in ("vramancer-demo, strategy balanced", "0-2 (3)", "3-5 (3)", "16 GiB", "KV cache: 131072 tokens"):
        assert part in text


def test_a_plan_for_cards_without_bf16_says_that_it_becomes_fp16(large: str) -> None:
    assert plan_json(large, "--gpu", "3090", "--gpu", "5070ti")["notes"] == []
    for cards, named in ((("3090", "2080ti"), "RTX 2080 Ti"), (("v100 32gb*2",), "V100 32GB#0, V100 32GB#1")):
        flags = [text for card in cards for text in ("--gpu", card)]
        assert f"float16 in place of bfloat16, which {named} cannot" in plan_json(large, *flags)["notes"][0]
    refused = CliRunner().invoke(app, ["plan", large, "--gpu", "t4*3", "--dtype", "bfloat16"])
    assert refused.exit_code == 1 and "compute capability 8.0" in refused.output


def test_a_plan_says_that_bf16_becomes_fp16(large: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (large, "--devices", "sim=80GiB@936GB/s/71TFLOPS")
    assert plan_json(*arguments)["notes"] == [] and "note:" not in plan_text(*arguments)
    monkeypatch.setattr("core.models.dtype.supports_bf16", lambda kind, capability: False)
    assert "float16 in place of bfloat16, which sim" in plan_json(*arguments)["notes"][0]
    assert "note: float16 in place of bfloat16" in plan_text(*arguments)


def test_planning_the_demo_model_reads_no_weights_and_needs_no_such_memory() -> None:
    placement = plan_json("--devices", "sim=2048GiB@936GB/s/71TFLOPS,cpu=64MiB", "--placement", "vram")
    assert [stage["device_name"] for stage in placement["stages"]] == ["sim", "cpu"]
    assert placement["stages"][0]["limit_bytes"] == 2048 * 1024**3
    assert placement["stages"][0]["first_layer"] == 0


def test_cards_that_are_not_there_are_planned_for_from_the_config_alone(large: str) -> None:
    plan = plan_json(large, "--gpu", "3090", "--gpu", "16GiB@896GB/s", "--max-model-len", "8192")
    assert sum(stage["last_layer"] - stage["first_layer"] for stage in plan["stages"]) == 48
    assert all(stage["weight_bytes"] + stage["kv_bytes"] <= stage["limit_bytes"] for stage in plan["stages"])
    one, eight, many = plan["prediction"]["rates"]
    assert one["streams"] == 1
    assert one["tok_s"] < eight["tok_s"] < many["tok_s"]
    assert one["tok_s"] == pytest.approx(1 / one["token_s"])
    assert 1 / one["tok_s"] >= plan["prediction"]["floor_s"] > 0.03, "29 GB over 936 and 896 GB/s"


def test_it_says_what_a_card_costs_or_brings(large: str) -> None:
    text = plan_text("--gpu", "3090", "--gpu", "2060", "--more", "3090")
    assert "RTX 2060 is left out: using it gives" in text
    assert "one more RTX 3090" in text
    assert "bottleneck" in text
    plan = plan_json(large, "--gpu", "3090", "--gpu", "5070 Ti", "--more", "5070 Ti", "--max-model-len", "8192")
    assert plan["one_more"][0]["gain"] > 0


def test_what_is_assumed_is_told(large: str) -> None:
    two = plan_json(large, "--gpu", "3090*2", "--max-model-len", "2048")
    overhead, overlap = two["assumed"]
    assert "0.3 ms of overhead per layer" in overhead and "11.6 GB/s" in overhead
    assert "not measured" in overlap and "overlap" in overlap
    assert overhead in plan_text(large, "--gpu", "3090*2", "--max-model-len", "2048")
    one = plan_json("--gpu", "3090")
    assert one["assumed"] == [overhead], "one card overlaps with nothing"
    assert plan_json("--devices", "sim=1GiB@936GB/s/71TFLOPS")["assumed"] == []


def test_what_devices_hold_together_is_told(large: str) -> None:
    cards = ["--gpu", "48GiB@1800GB/s", "--gpu", "24GiB@180GB/s", "--max-model-len", "8192"]
    text = CliRunner().invoke(app, ["plan", large, *cards, "--log-level", "error"]).output
    assert "without lending" in text and "no layers, memory for KV alone: 24GiB@180GB/s" in text
    plan = plan_json(large, *cards)
    assert plan["pooled"]["tokens"] > plan["kv_tokens"] == plan["pooled"]["local_tokens"][0]
    alone = plan_json(large, *cards, "--no-lending")
    assert alone["pooled"]["tokens"] == alone["kv_tokens"]


def test_one_more_of_each_card_is_told_without_asking(large: str) -> None:
    plan = plan_json(large, "--gpu", "3090*2", "--gpu", "5070 Ti", "--max-model-len", "2048")
    assert [effect["name"] for effect in plan["one_more"]] == ["RTX 3090", "RTX 5070 Ti"]
    assert all(effect["tok_s_without"] > 0 and effect["gain"] >= 0 for effect in plan["one_more"])
    asked = plan_json(large, "--gpu", "3090*2", "--more", "3060", "--max-model-len", "2048")
    assert [effect["name"] for effect in asked["one_more"]] == ["RTX 3060"]


def test_layers_by_hand(large: str) -> None:
    plan = plan_json(large, "--gpu", "24GiB@936GB/s*2", "--layers", "30,18", "--max-model-len", "2048")
    assert [(stage["first_layer"], stage["last_layer"]) for stage in plan["stages"]] == [(0, 30), (30, 48)]
    result = CliRunner().invoke(app, ["plan", large, "--gpu", "3090*2", "--layers", "30,19", "--log-level", "error"])
    assert result.exit_code == 1
    assert "48" in result.output


def test_unknown_cards_and_strategies_are_refused() -> None:
    for arguments, said in ((["--gpu", "3091"], "3090"), (["--gpu", "3090", "--placement", "best"], "balanced")):
        result = CliRunner().invoke(app, ["plan", *arguments, "--log-level", "error"])
        assert result.exit_code == 1
        assert said in result.output


def test_a_plan_that_does_not_fit_says_what_is_lacking() -> None:
    result = CliRunner().invoke(app, ["plan", "--devices", "cpu=1MiB", "--log-level", "error"])
    assert result.exit_code == 1
    assert "cpu lacks" in result.output


def test_bench_passes_its_flags_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    program = "import pathlib, sys; pathlib.Path('seen').write_text(' '.join(sys.argv[1:])); sys.exit(3)"
    (tmp_path / "benchmarks" / "run.py").write_text(program)
    monkeypatch.setattr(import_module("vramancer.cli.bench"), "CHECKOUT", tmp_path)
    result = CliRunner().invoke(app, ["bench", "--model", "small", "--help", "--streams", "1,4"])
    assert result.exit_code == 3
    assert (tmp_path / "seen").read_text() == "--model small --help --streams 1,4"


def test_bench_without_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(import_module("vramancer.cli.bench"), "CHECKOUT", tmp_path)
    result = CliRunner().invoke(app, ["bench"])
    assert result.exit_code == 1
    assert "from a checkout" in result.output
