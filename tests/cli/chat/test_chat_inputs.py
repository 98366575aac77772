"""What is the model and what the question, and texts that go before it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from core.errors import ConfigError
from vramancer.cli.chat.inputs import Texts, compose, is_keyboard, split_words


@pytest.mark.parametrize(
    ("words", "model", "question"),
    [
        ([], None, None),
        (["why"], None, "why"),
        (["./here"], "./here", None),
        (["here"], "here", None),
        (["Qwen/Qwen3-8B"], "Qwen/Qwen3-8B", None),
        (["vramancer-demo"], "vramancer-demo", None),
        (["./not-here"], "./not-here", None),
        (["a/b/c"], None, "a/b/c"),
        (["and/or what?"], None, "and/or what?"),
        (["x" * 5000], None, "x" * 5000),
        (["\0"], None, "\0"),
        (["anything", "a/b"], "anything", "a/b"),
    ],
)
def test_model_and_question(
    words: list[str], model: str | None, question: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert split_words(words) == (model, question)


@pytest.mark.parametrize(
    ("words", "said"), [(["a", "b", "c"], "in quotes"), ([" "], "is empty"), (["a/b", ""], "is empty")]
)
def test_words_that_make_no_sense(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        split_words(words)


def test_files_are_text_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfone\n")
    (tmp_path / "b").write_text("zwölf\n\n", encoding="utf-8")
    assert Texts().of_files([tmp_path / "b", tmp_path / "a"]) == ["zwölf", "one"]


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"ok \xff\xfe", r"not text in UTF-8 \(byte 3"), (b"PK\0\0", r"not text \(byte 2 is NUL"), (None, "No such file")],
)
def test_what_is_no_text(tmp_path: Path, data: bytes | None, said: str) -> None:
    path = tmp_path / "a"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ConfigError, match=said) as error:
        Texts().of_files([path])
    assert str(path) in error.value.message


def test_all_texts_share_one_limit(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("12345")
    assert Texts(10).of_files([path, path]) == ["12345", "12345"]
    with pytest.raises(ConfigError, match="may have 10 bytes"):
        Texts(10).of_files([path, path, path])


def test_a_program_without_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert Texts().of_stdin() == ""
    assert not is_keyboard(sys.stdin)


def test_parts_are_put_together() -> None:
    assert compose("file", None, " ", "why?") == "file\n\nwhy?"
