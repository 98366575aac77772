"""How answers look: Markdown on a terminal, plain text elsewhere, and never what a terminal would obey."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from cli.chat.scripted import Scripted, interrupted, on_terminal, says
from rich.console import Console

from scripts.captures import ANSWER, Terminal
from vramancer.cli.chat.answerer import Piece
from vramancer.cli.chat.conversation import Conversation
from vramancer.cli.chat.markdown import MarkdownWriter, split_blocks, stable_prefix
from vramancer.cli.chat.screen import Screen

PARAGRAPHS = "# Title\n\nSome *soft* text.\n\n- one\n- two\n\n```python\nx = [1]\n```\n\nThe <b>end</b>.\n"


def in_pieces(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_markdown_looks_the_same_however_it_comes(size: int) -> None:
    whole = on_terminal(Scripted(says(ANSWER)), "?", width=70).text
    pieces = on_terminal(Scripted(says(*in_pieces(ANSWER, size))), "?", width=70).text
    assert pieces.rpartition("\n")[0].splitlines()[:-1] == whole.rpartition("\n")[0].splitlines()[:-1]
    assert "**" not in whole
    assert " RTX 3090     936 GB/s   24\n" in whole


def test_words_wrap_and_markup_is_drawn() -> None:
    shown = on_terminal(Scripted(says("Some **words** that are more than twenty columns.")), "?", width=20).text
    assert shown.startswith("Some words that are\nmore than twenty\ncolumns.\n")


def test_lines_code_and_html_stay_as_they_were_written() -> None:
    text = "first\nsecond with <think>HTML</think>\n\n```py\ndef f():\n    return 1\n```\n"
    shown = on_terminal(Scripted(says(text)), "?").text
    assert shown.startswith("first\nsecond with <think>HTML</think>\n\ndef f():\n    return 1\n")


def test_finished_blocks_are_printed_once_and_only_the_last_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every token drawn, a first block that was drawn again would be written as often as there are tokens."""
    monkeypatch.setattr("vramancer.cli.chat.markdown._REDRAW_S", 0.0)
    monkeypatch.setattr("vramancer.cli.chat.markdown._SHARE_OF_TIME", 0)
    text = "Firstly.\n\n" + " ".join(f"word{number}" for number in range(60))
    terminal = on_terminal(Scripted(says("Firstly.\n\nx", *in_pieces(text[10:], 5))), "?")
    written = terminal.getvalue()
    assert written.count("Firstly.") == 1
    assert written.count("word0") > 20
    assert terminal.text.count("word0 ") == 1


def test_a_block_higher_than_the_terminal_shows_its_end_while_it_grows() -> None:
    lines = "".join(f"line {number}\n" for number in range(50))
    terminal = Terminal(40, 10)
    seen = []

    def grows() -> Iterator[Piece]:
        yield Piece("```\n", 1)
        for number, line in enumerate(lines.splitlines(keepends=True), start=2):
            yield Piece(line, number)
            seen.append(terminal.text)
        yield Piece("```\n", 99)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("vramancer.cli.chat.markdown._REDRAW_S", 0.0)
        patched.setattr("vramancer.cli.chat.markdown._SHARE_OF_TIME", 0)
        Screen(terminal.console(), terminal.console()).answer(grows())
    assert "line 30\n" in seen[30]
    assert "line 10\n" not in seen[30]
    written = terminal.getvalue()
    assert [f"line {number}" in written[written.rindex("line 0") :] for number in range(50)] == [True] * 50


def test_the_first_text_is_drawn_at_once_and_more_fifteen_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the clock reads at first: only its differences mean anything."""
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr("vramancer.cli.chat.markdown.time", SimpleNamespace(monotonic=lambda: clock.now_s))
    terminal = Terminal(60)
    writer = MarkdownWriter(terminal.console())
    shown = []
    for clock.now_s, text in ((0.0, "One"), (0.05, " two"), (0.07, " three"), (0.13, " four")):
        writer.write(text)
        shown.append(terminal.text)
    writer.finish()
    assert shown == ["One\n", "One\n", "One two three\n", "One two three\n"]
    assert terminal.text == "One two three four\n"


def test_nothing_that_is_drawn_has_spaces_at_the_ends_of_its_lines() -> None:
    """Lines as wide as the terminal would break in two where it is made narrower, and stay when they are erased."""
    terminal = Terminal(40)
    writer = MarkdownWriter(terminal.console())
    writer.write("Some words that are more than forty columns, **bold** too.")
    drawn = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", terminal.getvalue())
    writer.finish()
    assert "columns, bold too." in drawn
    assert [line for line in drawn.splitlines() if line.endswith(" ")] == []


@pytest.mark.parametrize("end", range(len(PARAGRAPHS) + 1))
def test_what_counts_as_finished_is_not_changed_by_what_follows(end: int) -> None:
    finished = stable_prefix(PARAGRAPHS[:end])
    assert finished <= end
    left = [block.strip() for block in split_blocks(PARAGRAPHS[:finished])]
    assert left == [block.strip() for block in split_blocks(PARAGRAPHS)][: len(left)]


@pytest.mark.parametrize(
    ("text", "finished"),
    [
        ("Text.\nMore.", ""),
        ("Text.\n\nMore", "Text.\n\n"),
        ("a\u2028b\x0bc\n\nMore", "a\u2028b\x0bc\n\n"),
        ("# Head\n", "# Head\n"),
        ("```\na\n\nb\n", ""),
        ("```\na\n```\n", "```\na\n```\n"),
        ("````\n```\n", ""),
        ("- a\n\n", ""),
        ("- a\n\nText.\n", "- a\n\n"),
        ("| a |\n|---|\n| 1 |\n", ""),
        ("| a |\n|---|\n| 1 |\n\n", "| a |\n|---|\n| 1 |\n\n"),
    ],
)
def test_what_is_finished(text: str, finished: str) -> None:
    assert text[: stable_prefix(text)] == finished


def test_an_item_whose_mark_has_not_come_whole_ends_no_list() -> None:
    assert stable_prefix("- one\n*") == 0  # it may become *emphasis* that goes on with the item
    assert stable_prefix("- one\n* two\n") == len("- one\n")


def test_escape_sequences_do_not_reach_the_terminal() -> None:
    evil = "a\x1b[31mb\x07\x9b2Jc\x7f\rd\x00\te"
    for plain in (False, True):
        terminal = Terminal(60)
        console = terminal.console()
        Screen(console, console, plain=plain).answer(iter_pieces(evil))
        assert "a[31mb2Jcd" in terminal.text
        for control in "\x07\x9b\x7f\r\x00":
            assert control not in terminal.getvalue().replace("\r\x1b", "")  # the drawing's own carriage return
        assert "\x1b[31mb" not in terminal.getvalue()


def test_names_and_errors_from_a_server_are_clean_too() -> None:
    terminal = Terminal(60)
    screen = Screen(terminal.console(), terminal.console())
    for say in (screen.note, screen.error, screen.show, lambda text: screen.show_table([[text]])):
        say("na\x1b]0;title\x07me [red]x")
    assert terminal.text.count("na]0;titleme [red]x") == 4
    assert "\x1b]" not in terminal.getvalue()


def iter_pieces(*texts: str) -> Iterator[Piece]:
    yield from (Piece(text, number) for number, text in enumerate(texts, start=1))


@pytest.mark.parametrize(
    "options", [{"no_color": True}, {"force_terminal": False}, {"dumb": True}, {"plain": True}, {"ascii": True}]
)
def test_plain_where_the_terminal_or_its_user_wants_that(options: dict[str, bool]) -> None:
    terminal = Terminal(60)
    if options.pop("ascii", False):
        terminal = type("AsciiTerminal", (Terminal,), {"encoding": "ascii"})(60)
    plain, dumb = options.pop("plain", False), options.pop("dumb", False)
    console = terminal.console(**options)
    if dumb:
        console = Console(file=terminal, width=60, force_terminal=True, _environ={"TERM": "dumb"})
    Screen(console, terminal.console(), plain=plain).answer(iter_pieces("**bold**", "\n\n- x — y"))
    shown = "?" if terminal.encoding == "ascii" else "—"
    assert terminal.getvalue() == f"**bold**\n\n- x {shown} y\n"


def test_in_a_pipe_every_character_of_the_answer_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    pipe, notes = io.StringIO(), io.StringIO()
    seconds = itertools.count()
    screen = Screen(Console(file=pipe), Console(file=notes), clock=lambda: next(seconds))
    Conversation(Scripted(says("**a**\t", "\x1bb")), screen, {}).ask("?")
    assert pipe.getvalue() == "**a**\t\x1bb\n"
    assert "2 tokens" in notes.getvalue()


@pytest.mark.parametrize("texts", [("Yes.\n",), ("Yes.", "\n"), ("Yes.",), ("Yes.\n", "")])
def test_a_plain_answer_ends_with_one_newline(texts: tuple[str, ...]) -> None:
    pipe = io.StringIO()
    Screen(Console(file=pipe), Console(file=io.StringIO())).answer(iter_pieces(*texts))
    assert pipe.getvalue() == "Yes.\n"


def test_something_stands_there_until_the_answer_comes() -> None:
    terminal = Terminal(60)
    seen = []

    def slow() -> Iterator[Piece]:
        seen.append(terminal.text)
        yield Piece("Yes.", 1)

    Screen(terminal.console(), terminal.console()).answer(slow())  # type: ignore[arg-type]
    assert seen == ["...\n"]
    assert terminal.text == "Yes.\n"


def test_ctrl_c_leaves_the_terminal_as_it_was() -> None:
    terminal = on_terminal(Scripted(interrupted), "?")
    assert terminal.text.startswith("I was say\n3 tokens, first token after")
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h") > 0
