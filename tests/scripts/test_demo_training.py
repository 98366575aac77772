"""Training of the demo model: what a step sees, the learning rate, and going on after an interruption."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import train_demo_model
from demo_corpus.numbers import equation
from demo_training import network, optimizers
from demo_training.batches import DOUBLE_FROM, FOCUS_FROM, IGNORED, LONG, LONG_EVERY, SHORT, Lessons
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from core.models.resolve import DEMO_PATH

LARGEST_BYTES = 12_000_000


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return network.build_tokenizer(7, 400)


@pytest.fixture
def program(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The program with steps of 512 tokens, writing below `tmp_path`."""
    monkeypatch.setattr(train_demo_model, "build_tokenizer", lambda seed: tokenizer)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    threads = torch.get_num_threads()

    def run(*flags: str, out: str = "out") -> None:
        paths = ["--out", str(tmp_path / out), "--checkpoint", str(tmp_path / out / "kept" / "checkpoint.pt")]
        arguments = ["train_demo_model.py", "--tokens", "512", "--threads", str(threads), *paths, *flags]
        monkeypatch.setattr(sys, "argv", arguments)
        train_demo_model.main()

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return LlamaForCausalLM.from_pretrained(folder).state_dict()


def test_a_step_depends_on_its_number_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    lessons = Lessons(tokenizer, seed=7, tokens=1024)
    one, other = lessons.batch(3, 0.1), lessons.batch(3, 0.1)
    assert all(torch.equal(left, right) for left, right in zip(one, other, strict=True))
    assert not torch.equal(lessons.batch(4, 0.1).ids, one.ids)
    assert not torch.equal(lessons.batch(3, FOCUS_FROM + 0.01).ids, one.ids)
    assert one.ids.shape == (1024 // SHORT, SHORT)
    assert lessons.batch(3, DOUBLE_FROM + 0.01).ids.shape == (2048 // SHORT, SHORT)
    assert lessons.batch(LONG_EVERY - 1, 0.1).ids.shape == (1, LONG)


def test_documents_in_a_row_do_not_see_each_other(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = Lessons(tokenizer, seed=7, tokens=SHORT).batch(0, 0.0)
    starts = (batch.positions[0] == 0).nonzero().flatten().tolist()
    assert len(starts) > 2 and batch.ids[0, starts[1]] in (tokenizer.bos_token_id, tokenizer.pad_token_id)
    mask = batch.mask[0, 0]
    assert not mask[starts[1], : starts[1]].any()
    assert mask[starts[1] - 1, : starts[1]].all()
    assert not mask.triu(1).any()


@pytest.mark.parametrize("step", [0, LONG_EVERY - 1])
def test_rows_are_full(tokenizer: PreTrainedTokenizerFast, step: int) -> None:
    batch = Lessons(tokenizer, seed=7, tokens=2048).batch(step, 0.0)
    padding = batch.ids == tokenizer.pad_token_id
    assert padding.float().mean() < 0.06
    assert (batch.labels[padding] == IGNORED).all()
    assert (batch.positions.max() > SHORT) == (step == LONG_EVERY - 1), "long conversations, or none"


def test_only_answers_are_learnt_and_shifted_by_one(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = Lessons(tokenizer, seed=7, tokens=1024).batch(1, 0.0)
    learnt = batch.labels != IGNORED
    assert 0.05 < learnt.float().mean() < 0.9
    following = torch.roll(batch.ids, -1, 1)
    assert torch.equal(batch.labels[learnt], following[learnt])


def test_digits_are_tokens_of_their_own(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode(equation(37, 45, "+"), add_special_tokens=False)
    assert [token for token in tokenizer.convert_ids_to_tokens(ids) if token.isdigit()] == list("3745701282")


def test_the_learning_rate_rises_stays_and_falls_to_zero() -> None:
    rates = [optimizers.learning_rate(step / 1000) for step in range(1001)]
    peak = [index for index, rate in enumerate(rates) if rate == 1.0]
    assert 0 < rates[0] < 0.1 and peak[0] <= 10 and peak[-1] == 300
    assert rates[300:] == sorted(rates[300:], reverse=True) and rates[-1] == 0.0


def test_an_interrupted_training_ends_with_the_same_weights(
    program: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program("--steps", "3", out="whole")
    step = train_demo_model.Training._step

    def one_step(training: train_demo_model.Training, batch: object) -> float:
        training.interrupt()
        return step(training, batch)

    with monkeypatch.context() as patched:
        patched.setattr(train_demo_model.Training, "_step", one_step)
        program("--steps", "3", out="broken")
    assert "--resume goes on" in capsys.readouterr().out
    assert not (tmp_path / "broken" / "model.safetensors").exists()
    program("--steps", "3", "--resume", "--seed", "8", out="broken")  # the seed is the checkpoint's
    whole, broken = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert not (tmp_path / "broken" / "kept" / "checkpoint.pt").exists(), "it has ended"


def test_a_trained_model_is_taught_further(
    program: Callable[..., None], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(1)
    network.save(network.build_model(tokenizer), tokenizer, tmp_path / "first")
    first = weights(tmp_path / "first")
    program("--steps", "3", "--start", str(tmp_path / "first"), out="second")
    second = weights(tmp_path / "second")
    moved = max((second[name] - first[name]).abs().max().item() for name in first)
    assert 0 < moved < 0.1, "it went on from these weights"
    assert (tmp_path / "second" / "tokenizer.json").read_text() == (tmp_path / "first" / "tokenizer.json").read_text()
    seen = [float(line.split(", ")[1].split()[0]) for line in capsys.readouterr().out.splitlines() if "step" in line]
    assert seen[0] > 70 and seen[-1] == 100, "late in the schedule"
    for wrong, said in (("none", "there is no model"), ("first", "--start is for a new training")):
        flags = ["--start", str(tmp_path / wrong), *(["--resume"] if wrong == "first" else [])]
        with pytest.raises(SystemExit):
            program(*flags, out="third")
        assert said in capsys.readouterr().err


def test_a_checkpoint_is_not_overwritten_and_has_to_be_there(
    program: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        program("--resume", out="none")
    assert "there is no checkpoint" in capsys.readouterr().err
    kept = tmp_path / "some" / "kept" / "checkpoint.pt"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"kept")
    with pytest.raises(SystemExit):
        program("--steps", "1", out="some")
    assert "--resume goes on" in capsys.readouterr().err and kept.read_bytes() == b"kept"


def test_a_new_model_is_as_large_as_may_be_shipped(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    network.save(network.build_model(tokenizer), tokenizer, tmp_path)
    assert LARGEST_BYTES / 2 < (tmp_path / "model.safetensors").stat().st_size <= LARGEST_BYTES


def test_the_shipped_model_is_small_and_what_it_says_of_its_size_holds() -> None:
    from demo_corpus import product
    from safetensors import safe_open

    file = DEMO_PATH / "model.safetensors"
    assert file.stat().st_size <= LARGEST_BYTES
    with safe_open(file, framework="pt") as opened:
        tensors = [opened.get_tensor(name) for name in opened.keys()]  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    millions = sum(tensor.numel() for tensor in tensors) / 1e6
    assert any(f"about {millions:.1f} million parameters" in fact.answer for fact in product.IDENTITY)
