"""`vramancer plan --fit`: the best quantization that fits the given cards."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from quantization import written
from transformers import LlamaConfig
from typer.testing import CliRunner, Result

from core.config import iter_settings
from vramancer.cli import app

PAIR = ("--gpu", "3090", "--gpu", "5070 Ti", "--max-model-len", "8192")
EMULATED = "sim=24GiB@936GB/s/71TFLOPS,sim=16GiB@896GB/s/88TFLOPS"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for info in iter_settings():
        monkeypatch.delenv(info.env, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def fit(*arguments: str, width: int = 80) -> Result:
    return CliRunner().invoke(app, ["plan", "--fit", "--log-level", "error", *arguments], env={"COLUMNS": str(width)})


def lines(*arguments: str, width: int = 80) -> list[str]:
    result = fit(*arguments, width=width)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def model(folder: Path, billions: int) -> str:
    """Of Llama's shape; the config alone is there."""
    hidden, inner, layers = {8: (4096, 14336, 32), 32: (5120, 27648, 64), 70: (8192, 28672, 80)}[billions]
    LlamaConfig(
        architectures=["LlamaForCausalLM"], vocab_size=128256, hidden_size=hidden, intermediate_size=inner,
        num_hidden_layers=layers, num_attention_heads=hidden // 128, num_key_value_heads=8, head_dim=128,
        dtype="bfloat16", max_position_embeddings=32768, tie_word_embeddings=False,
    ).save_pretrained(folder / f"llama-{billions}b")  # fmt: skip
    return str(folder / f"llama-{billions}b")


@pytest.mark.parametrize(
    ("billions", "rows"),
    [
        (8, ["bfloat16 yes", "int8, groups of 128 yes", "int4, groups of 64 yes"]),
        (32, ["int8, groups of 128 yes", r"bfloat16 \d\d of 64 layers stream", "int4, groups of 64 yes"]),
        (70, [r"int4, groups of 64 \d\d of 80 layers stream",
              r"bfloat16 \d\d of 80 layers stream", r"int8, groups of 128 \d\d of 80 layers stream"]),
    ],
)  # fmt: skip
def test_the_best_that_fits_is_chosen(tmp_path: Path, billions: int, rows: list[str]) -> None:
    """Or what is fastest where layers stay in main memory in any case; its plan and prediction follow."""
    path = model(tmp_path, billions)
    shown = lines(path, *PAIR)
    assert all(len(line) <= 80 for line in shown)
    assert shown[0].split() == ["weights", "fits", "tokens", "of", "KV", "tok/s,", "1", "stream"]
    for line, row in zip(shown[1:4], rows, strict=True):
        assert re.fullmatch(row + r" [\d,]{5,} \d+\.\d", " ".join(line.split())), line
    kind = rows[0].replace(",", " ").split()[0]
    rest = "\n".join(shown[4:])
    assert ("Serve it with --quantize" in rest) == (kind != "bfloat16")
    assert kind == "bfloat16" or f"Serve it with --quantize {kind}." in rest
    verdict = next(line for line in shown if line.startswith("Fits"))
    assert verdict.startswith("Fits, with layers in main memory." if billions == 70 else "Fits.")
    speed = shown[1].split()[-1]
    assert f"\n{speed} tok/s at 1 stream" in rest, "the plan is that of the first row"


def test_a_plan_is_the_same_as_with_that_quantization(tmp_path: Path) -> None:
    path = model(tmp_path, 32)
    plain = CliRunner().invoke(app, ["plan", path, *PAIR, "--quantize", "int8", "--json", "--log-level", "error"])
    expected = json.loads(plain.stdout)
    found: dict[str, Any] = json.loads(fit(path, *PAIR, "--json").stdout)
    verdicts = found.pop("fit")
    assert found == expected
    assert [each["quantize"] for each in verdicts] == ["int8", "none", "int4"]
    first = verdicts[0]
    assert first["fits"] and first["tok_s"] == expected["prediction"]["rates"][0]["tok_s"]
    assert first["kv_tokens"] == expected["pooled"]["tokens"]
    assert not verdicts[1]["fits"] and verdicts[1]["streamed_layers"] > 0
    assert expected["model"]["quantization"] == "int8, groups of 128"


def test_what_has_no_plan_says_why(tmp_path: Path) -> None:
    path = model(tmp_path, 70)
    shown = lines(path, *PAIR, "--stream-weights", "off", "--quantize-group", "256", "--gpu", "3060")
    assert " ".join(shown[1].split()).startswith("int4, groups of 256 yes")
    assert [" ".join(line.split()) for line in shown[2:4]] == ["as it is no - -", "int8 no - -"]
    text = " ".join(" ".join(shown).split())
    assert "as it is: The model needs about 1" in text and "int8: The model needs about" in text


def test_where_nothing_fits_a_plan_is_refused(tmp_path: Path) -> None:
    result = fit(model(tmp_path, 70), "--gpu", "3060", "--stream-weights", "off")
    assert result.exit_code == 1
    assert "The model needs about 4" in result.output, "the least of them"


def test_it_tries_all_or_one(tmp_path: Path) -> None:
    result = fit(model(tmp_path, 8), *PAIR, "--quantize", "int4")
    assert result.exit_code == 1
    assert "leave one of them out" in " ".join(result.output.split())


def test_a_quantized_checkpoint_has_one_kind(tmp_path: Path) -> None:
    written.gptq(tmp_path / "gptq", bits=4, group=32)
    shown = lines(str(tmp_path / "gptq"), "--gpu", "3090", width=100)
    assert shown[1].startswith("GPTQ, 4 bits, groups of 32  yes")
    assert shown[2] == "" and "Serve it with" not in "\n".join(shown)


def test_a_kind_that_does_not_fit_the_checkpoint_is_told(tmp_path: Path) -> None:
    LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=256, intermediate_size=684, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=512, dtype="bfloat16",
    ).save_pretrained(tmp_path / "odd")  # fmt: skip
    shown = lines(str(tmp_path / "odd"), "--gpu", "3090", width=200)
    assert shown[1].startswith("bfloat16")
    assert " ".join(shown[3].split()) == "int4 no - -"
    assert "down_proj has 684 columns; int4 takes multiples of 8" in shown[4]


@pytest.mark.slow
def test_70_billion_parameters_on_emulated_cards(tmp_path: Path) -> None:
    """In int4, the head too, on 24 and 16 GiB that are emulated."""
    asked = ("--quantize", "int4", "--quantize-keep", "none", "--stream-weights", "off", "--max-model-len", "2048")
    result = CliRunner().invoke(
        app, ["plan", model(tmp_path, 70), "--devices", EMULATED, *asked, "--log-level", "error"], env={"COLUMNS": "80"}
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Fits. llama-70b: 70.6 B parameters, ")
    speed = re.search(r"^(\d+\.\d) tok/s at 1 stream", result.stdout, re.MULTILINE)
    assert speed is not None and 10 < float(speed[1]) < 936 / 40, "each byte is read once for a token"


def test_cards_are_planned_for_without_torch(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom vramancer.cli import app\n"
        "try:\n    app(['plan', sys.argv[1], '--fit', '--gpu', '3090', '--gpu', '5070 Ti', '--log-level', 'error'])\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "print(sorted({'torch', 'transformers'} & sys.modules.keys()))\n"
    )
    command = [sys.executable, "-c", program, model(tmp_path, 32)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "[]"
