"""`vramancer plan` and `vramancer bench`."""

from __future__ import annotations

import io
import json
from importlib import import_module
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from core.config import iter_settings
from core.placement import PlacementPlan, StagePlan
from vramancer.cli import app
from vramancer.cli.plan import print_plan

MIB = 1024 * 1024


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for info in iter_settings():
        monkeypatch.delenv(info.env, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_a_plan_is_a_row_per_stage() -> None:
    stages = (
        StagePlan("cuda:0", 0, 0, 20, 100 * MIB, 2048, 40 * MIB, 8 * MIB, 1024 * MIB),
        StagePlan("cuda:1", 1, 20, 32, 60 * MIB, 1024, 20 * MIB, 8 * MIB, 512 * MIB),
    )
    console = Console(file=io.StringIO(), width=200)
    print_plan(PlacementPlan("tiny", "vram", stages, 20480, ("cpu",)), console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for part in ("tiny, strategy vram", "0-19 (20)", "20-31 (12)", "100 MiB", "876 MiB", "512 MiB", "not used: cpu"):
        assert part in text
    assert "20480 tokens, 3 KiB each" in text


def test_planning_the_demo_model_reads_no_weights_and_needs_no_such_memory() -> None:
    devices = "sim=2048GiB@936GB/s/71TFLOPS,cpu=64MiB"
    result = CliRunner().invoke(app, ["plan", "--devices", devices, "--json", "--log-level", "error"])
    assert result.exit_code == 0, result.output
    placement = json.loads(result.stdout)
    assert [stage["device_name"] for stage in placement["stages"]] == ["sim", "cpu"]
    assert placement["stages"][0]["limit_bytes"] == 2048 * 1024**3
    assert placement["stages"][0]["first_layer"] == 0


def test_a_plan_that_does_not_fit_says_what_is_lacking() -> None:
    result = CliRunner().invoke(app, ["plan", "--devices", "cpu=1MiB", "--log-level", "error"])
    assert result.exit_code == 1
    assert "cpu lacks" in result.output


def test_bench_passes_its_flags_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
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
