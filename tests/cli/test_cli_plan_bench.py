"""`vramancer plan` and `vramancer bench`."""

from __future__ import annotations

import io
import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from core.config import iter_settings
from core.placement.predict import DeviceEffect
from vramancer.cli import app
from vramancer.cli.plan_view import _gain


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


WIDTHS = [80, 120]


def plan_at(width: int, *arguments: str, **environ: str) -> list[str]:
    settings = {"COLUMNS": str(width), "TERM": "xterm-256color", **environ}
    result = CliRunner().invoke(app, ["plan", *arguments, "--log-level", "error"], env=settings)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_verdict_comes_first_and_each_device_is_a_bar(large: str, width: int) -> None:
    lines = plan_at(width, large, "--gpu", "3090", "--gpu", "5070 Ti", "--max-model-len", "8192", "--no-lending")
    text = "\n".join(lines)
    assert all(len(line) <= width for line in lines)
    assert lines[0] == "Fits. llama-14b: 14.8 B parameters, 27.5 GiB in bfloat16"
    assert re.fullmatch(r"[\d,]+ tokens of KV \(longest context 8,192, 192 KiB a token\)", lines[1])
    assert re.match(r"\d+\.\d tok/s at 1 stream, \d+\.\d tok/s at 8 streams \(predicted, 2,048 tokens", lines[2])
    plan = plan_json(large, "--gpu", "3090", "--gpu", "5070 Ti", "--max-model-len", "8192", "--no-lending")
    for stage in plan["stages"]:
        (bar,) = (line for line in lines if line.startswith(stage["device_name"]))
        figures = bar if width == 120 else lines[lines.index(bar) + 1]
        assert f"layers {stage['first_layer']}-{stage['last_layer'] - 1}" in figures
        weights = stage["weight_bytes"] / 1024**3
        assert f"{weights:.1f} GiB + " in figures and " KV + " in figures
        total = stage["limit_bytes"] + plan["reserved_bytes"][stage["device_index"]]
        assert f"of {total / 1024**3:.1f} GiB" in figures
        length = sum(map(bar.count, "█▓▒░╳"))
        assert bar.count("█") == pytest.approx(length * stage["weight_bytes"] / total, abs=1)
        assert bar.count("▓") == pytest.approx(length * stage["kv_bytes"] / total, abs=1)
    assert "█ weights  ▓ KV  ▒ workspace  ░ free  ╳ kept" in text
    assert "of roofline" in text and "bottleneck" in text
    assert re.search(
        r"A token takes \d+\.\d ms at 1 stream: reading weights and KV \d+%, overhead of\s+layers \d+%", text
    )
    assert "\x1b" not in text


def test_bars_are_plain_where_the_terminal_knows_no_blocks(large: str, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from core.config import load_settings
    from core.engine.preview import preview
    from vramancer.cli.plan_view import print_plan

    shown = preview(load_settings(overrides={"model.name": large}), ["3090*2"])
    for encoding, marks in (("ascii", "#=+.x"), ("utf-8", "█▓▒░╳")):
        file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        print_plan(shown, Console(file=file, width=80))
        file.seek(0)
        bar = next(line for line in file.read().splitlines() if line.startswith("RTX 3090#0"))
        assert set(bar.removeprefix("RTX 3090#0").strip()) <= set(marks) and bar.count(marks[0]) > 10
    coloured = io.StringIO()
    print_plan(shown, Console(file=coloured, width=80, force_terminal=True, color_system="standard"))
    assert "\x1b[1;32mFits." in coloured.getvalue()


def test_layers_that_stream_in_are_part_of_the_verdict(large: str) -> None:
    lines = plan_at(80, large, "--gpu", "3060")
    assert lines[0].startswith("Fits, with layers in main memory. llama-14b")
    assert any("streamed" in line for line in lines)
    assert any(
        re.match(r"RTX 3060 streams \d+ of 48 layers from main memory, \d+\.\d GiB per step", line) for line in lines
    )


def test_room_for_driver_and_desktop_is_kept(large: str) -> None:
    plan = plan_json(large, "--gpu", "3090", "--gpu", "a100 40gb", "--gpu", "24GiB@936GB/s", "--gpu", "m2 max 64gb")
    gib = 1024**3
    consumer, server, described, mac = plan["reserved_bytes"]
    assert consumer / gib == pytest.approx(24 * 0.013 + 0.5 + 0.5, rel=0.01)
    assert server / gib == pytest.approx(40 * 0.013 + 0.5, rel=0.01), "it drives no screen"
    assert described == 0, "taken at its word"
    assert mac == 16 * gib, "macOS keeps a quarter"
    assert any("desktop" in line for line in plan["assumed"])


def test_a_plan_that_a_load_would_refuse_is_refused(large: str) -> None:
    """Lending brings devices together, but not to as much KV as one request of that length needs."""
    cards = ("--gpu", "20GiB@900GB/s", "--gpu", "12GiB@400GB/s", "--stream-weights", "off", "--max-model-len")
    held = plan_json(large, *cards, "1024")["pooled"]["tokens"]
    assert plan_json(large, *cards, str(held - 1024))["pooled"]["tokens"] >= held - 1024
    refused = CliRunner().invoke(app, ["plan", large, *cards, "32768", "--log-level", "error"])
    assert held < 32768 and refused.exit_code == 1, refused.output
    assert "KV cache of 32768 tokens" in refused.output and "--max-model-len" in refused.output


def test_what_numbers_rest_on_is_told(large: str) -> None:
    text = "\n".join(plan_at(200, large, "--gpu", "3090*2"))
    assert "from datasheets: memory, bandwidth and compute of the cards" in text
    emulated = "\n".join(plan_at(200, "--devices", "sim=1GiB@936GB/s/71TFLOPS,cpu=64MiB"))
    assert "as told: the speeds of emulated devices" in emulated and "datasheet" not in emulated


def test_a_plan_for_cards_without_bf16_says_that_it_becomes_fp16(large: str) -> None:
    assert plan_json(large, "--gpu", "3090", "--gpu", "5070ti")["notes"] == []
    for cards, named in ((("3090", "2080ti"), "RTX 2080 Ti"), (("v100 32gb*2",), "V100 32GB#0, V100 32GB#1")):
        flags = [text for card in cards for text in ("--gpu", card)]
        assert f"float16 in place of bfloat16, which {named} cannot" in plan_json(large, *flags)["notes"][0]
    refused = CliRunner().invoke(app, ["plan", large, "--gpu", "t4*3", "--dtype", "bfloat16"])
    assert refused.exit_code == 1 and "compute capability 8.0" in refused.output


def test_a_plan_for_a_card_that_torchs_wheels_left_behind_says_so(large: str) -> None:
    old = "GTX 1080 Ti (sm_61): planned by its datasheet, but PyTorch's wheels"
    fp16, wheels, slow = plan_json(large, "--gpu", "1080ti", "--gpu", "3090", "--max-model-len", "2048")["notes"]
    assert "float16 in place of bfloat16, which GTX 1080 Ti cannot" in fp16
    assert old in wheels and "fp16 far slower" in slow
    float32 = plan_json(large, "--gpu", "1080ti*6", "--dtype", "float32", "--max-model-len", "2048")["notes"]
    assert len(float32) == 1 and old in float32[0]
    more = plan_json(large, "--gpu", "3090*2", "--more", "1080 Ti", "--max-model-len", "2048")["notes"]
    assert len(more) == 1 and old in more[0]
    assert f"note: {old}" in plan_text("--gpu", "1080 Ti")


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
    overhead, kept, overlap = two["assumed"]
    assert "0.3 ms of overhead per layer" in overhead and "11.6 GB/s" in overhead
    assert "not measured" in overlap and "overlap" in overlap
    assert overhead in plan_text(large, "--gpu", "3090*2", "--max-model-len", "2048")
    one = plan_json("--gpu", "3090")
    assert one["assumed"] == [overhead, kept], "one card overlaps with nothing"
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


def test_one_more_card_that_brings_nothing_says_so(large: str) -> None:
    arguments = (large, "--gpu", "3090*2", "--more", "1050 2GB", "--more", "5090", "--max-model-len", "2048")
    slow, fast = plan_json(*arguments)["one_more"]
    assert slow["tok_s"] == slow["tok_s_without"] and fast["gain"] > 0.1
    text = plan_text(*arguments)
    rate = f"{slow['tok_s']:.1f}"
    assert f"one more GTX 1050 2GB: brings nothing ({rate} tok/s with and without it)" in text
    assert f"one more RTX 5090: with it gives {fast['tok_s']:.1f} instead of {rate} tok/s (+" in text


def test_a_gain_that_rounds_to_nothing_is_no_percentage() -> None:
    assert _gain(DeviceEffect("x", 621.9, 620.4, 8)) == "brings hardly anything (621.9 instead of 620.4 tok/s)"
    assert _gain(DeviceEffect("x", 62.14, 62.12, 8)) == "brings nothing (62.1 tok/s with and without it)"
    assert _gain(DeviceEffect("x", 66.0, 60.0, 8)) == "with it gives 66.0 instead of 60.0 tok/s (+10%)"
    assert _gain(DeviceEffect("x", None, 60.0, 0)) == "no plan with it holds as much KV"


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
