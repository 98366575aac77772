"""Typing questions: editing, quotes of several lines, history, completion; and without a terminal."""

from __future__ import annotations

import io
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from vramancer.cli.chat.commands import completions
from vramancer.cli.chat.editor import Editor, LineReader, command_completer, is_open, unquoted


@pytest.fixture
def keys() -> Iterator[PipeInput]:
    """What is typed."""
    with create_pipe_input() as typed, create_app_session(input=typed, output=DummyOutput()):
        yield typed


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "chat-history"


def editor(path: Path, notes: list[str] | None = None) -> Editor:
    return Editor(path, completions(), ([] if notes is None else notes).append)


def test_a_line_can_be_edited(keys: PipeInput, path: Path) -> None:
    keys.send_text("helo\x1b[Dl\x01> \r")  # left, and to the beginning
    assert editor(path).read() == "> hello"


def test_quotes_take_several_lines(keys: PipeInput, path: Path) -> None:
    keys.send_text('"""one\rtwo\r"""\r')
    assert unquoted(editor(path).read()) == "one\ntwo"


def test_alt_enter_begins_a_line_and_enter_ends_all(keys: PipeInput, path: Path) -> None:
    keys.send_text("one\x1b\rtwo\r")
    assert editor(path).read() == "one\ntwo"


def test_questions_are_kept_for_the_next_session_and_the_owner_alone(keys: PipeInput, path: Path) -> None:
    keys.send_text('first\r"""a\rb"""\r')
    session = editor(path)
    session.read()
    session.read()
    if sys.platform != "win32":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    later = editor(path)
    keys.send_text("\x1b[A\x1b[A\x1b[A\x05!\r")  # up over the two lines, to the end
    assert later.read() == "first!"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_a_history_that_others_could_read_is_closed_to_them(keys: PipeInput, path: Path) -> None:
    path.parent.mkdir()
    path.write_text("")
    path.chmod(0o644)
    editor(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_without_a_place_for_the_history_questions_are_taken_and_it_is_said(keys: PipeInput, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    notes: list[str] = []
    session = editor(tmp_path / "state" / "chat-history", notes)
    assert "questions are not kept" in notes[0]
    keys.send_text("hello\r")
    assert session.read() == "hello"


def test_a_history_that_can_no_longer_be_written(keys: PipeInput, path: Path) -> None:
    notes: list[str] = []
    session = editor(path, notes)
    path.unlink()
    path.mkdir()
    keys.send_text("hello\r")
    assert session.read() == "hello"
    assert notes == [f"{path}: the question is not kept: Is a directory."]


def test_an_answer_to_go_on_is_no_question_of_the_history(keys: PipeInput, path: Path) -> None:
    session = editor(path)
    keys.send_text("y\r")
    assert session.read("Go on? [y/N] ") == "y"
    assert path.read_text() == ""


def test_ctrl_c_and_ctrl_d(keys: PipeInput, path: Path) -> None:
    session = editor(path)
    keys.send_text("half\x03")
    with pytest.raises(KeyboardInterrupt):
        session.read()
    keys.send_text("\x04")
    with pytest.raises(EOFError):
        session.read()


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("/s", {"/set", "/system", "/save"}),
        ("/set temp", {"/set temperature"}),
        ("/set system be", set()),
        ("/model x", set()),
        ("s", set()),
    ],
)
def test_tab_completes_commands_and_settings(typed: str, completed: set[str]) -> None:
    found = command_completer(completions()).get_completions(Document(typed), CompleteEvent())
    assert {typed[: len(typed) + each.start_position] + each.text for each in found} == completed


@pytest.mark.parametrize(
    ("text", "opened"),
    [('"""', True), ('"""a', True), ('"""a"""', False), ('""""""', False), ("a", False), ('""', False)],
)
def test_quotes(text: str, opened: bool) -> None:
    assert is_open(text) is opened


def test_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[str] = []
    monkeypatch.setattr(sys, "stdin", io.StringIO('one\n"""two\nthree"""\nfour'))
    reader = LineReader(prompts.append)
    assert [reader.read(), reader.read(), reader.read()] == ["one", '"""two\nthree"""', "four"]
    with pytest.raises(EOFError):
        reader.read()
    assert prompts == ["> ", "> ", "... ", "> ", "> "]
