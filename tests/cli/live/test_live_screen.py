"""The dashboard on an emulated terminal, against a server made up by the test."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from cli.live.live_cases import (
    CANCELLED,
    QUICK_S,
    colors_in,
    connecting,
    dashboard_on,
    fill,
    watching,
)
from prompt_toolkit.data_structures import Size
from steering import LONGEST_WAIT_S, until

from vramancer.cli.live import screen as screen_module
from vramancer.cli.live.watch import Watcher

SIZES = [(80, 24), (120, 40), (60, 24)]
ENTERED, LEFT, CURSOR = "\x1b[?1049h", "\x1b[?1049l", "\x1b[?25h"
SLOW_S = 3600.0
"""Between two looks, where a test wants the first alone."""


@pytest.fixture
def filled(server: Any) -> Any:
    """A server that says what the example's does."""
    fill(server)
    return server


def given_back(written: str) -> bool:
    """Whether the terminal has been left as it was."""
    end = written[written.rindex(ENTERED) :]
    return LEFT in end and CURSOR in end[end.index(LEFT) :]


@pytest.mark.parametrize("colors", [True, False], ids=["colours", "none"])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_first_page_at_every_size(filled: Any, width: int, height: int, colors: bool) -> None:
    with watching(filled, width=width, height=height, colors=colors) as shown:
        shown.until("[1 overview]")
        lines = shown.lines
        assert lines[0].startswith("Qwen/Qwen3-14B  degraded  up 1 d 2 h")
        assert lines[1].startswith(filled.url)
        assert lines[height - 1].startswith("[1 overview] 2 devices  3 requests  4 memory  ? help  q quit")
        for text in (
            "degraded: disk",
            "Speed ",
            "Batch ",
            "Latency ",
            "cuda:2 ",
            "disk ",
            "Tasks",
            "chatcmpl-a81f3f0a",
        ):
            assert text in shown.text, text
        written = shown.written
    assert bool(colors_in(written)) is colors
    assert ENTERED in written
    assert given_back(shown.written)
    assert shown.status == 0


def test_keys_turn_pages_and_select(filled: Any) -> None:
    with watching(filled) as shown:
        for key, text in (
            ("2", "[2 devices]"), ("3", "[3 requests]"), ("4", "[4 memory]"), ("1", "[1 overview]"), ("?", "[? help]"),
            ("\x1b", "[1 overview]"), ("\t", "[2 devices]"), ("\t", "[3 requests]"), ("\x1b[Z", "[2 devices]"),
        ):  # fmt: skip
            shown.type(key)
            shown.until(text)
        assert "utilisation 96%" in shown.text
        shown.type("3")
        shown.until(">  chatcmpl-5d0c7c7e9f")
        shown.type("\x1b[B")
        shown.until(">  chatcmpl-a81f3f0a77")
        shown.type("j")
        shown.until(">  cmpl-0f7be31d8f6c")
        shown.type("\x1b[A")
        shown.until(">  chatcmpl-a81f3f0a77")
        shown.type("!")  # means nothing
        shown.type("\x1b[F")
        shown.until(">  chatcmpl-ee2d1b5a11")


def test_a_request_is_cancelled_after_a_question(filled: Any) -> None:
    filled.answers[CANCELLED] = (200, b'{"cancelled": ["chatcmpl-a81f3f0a77f64d0c9d-0"]}')
    with watching(filled) as shown:
        shown.type("3\x1b[Bc")
        shown.until("Cancel chatcmpl-a81f3f0a77f64d0c9d-0? y: yes, any other key: no")
        shown.type("n")
        shown.until("nothing is cancelled")
        assert not [seen for seen in filled.seen if seen[0] == "POST"]
        shown.type("c")
        shown.until("Cancel chatcmpl-a81f3f0a77f64d0c9d-0?")
        shown.type("y")
        shown.until("chatcmpl-a81f3f0a77f64d0c9d-0 is cancelled.")
    assert [seen for seen in filled.seen if seen[0] == "POST"] == [("POST", CANCELLED, "Bearer secret", b"{}")]


def test_a_server_that_goes_and_comes_back(filled: Any) -> None:
    with watching(filled) as shown:
        kept = dict(filled.answers)
        filled.answers.clear()
        shown.until("not here Waiting for it; this picture is ")
        shown.until("cuda:0")
        assert "Qwen/Qwen3-14B" in shown.text, "the last picture stays"
        shown.type("2")
        shown.until("[2 devices]")
        filled.answers |= kept
        shown.until_not("Waiting for it")


def test_keys_work_while_the_server_hangs(filled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vramancer.cli.live.parts.GONE_S", QUICK_S)
    monkeypatch.setattr("vramancer.cli.live.screen._TICK_S", QUICK_S)
    asking, over = threading.Event(), threading.Event()

    def hang(file: Any) -> None:
        asking.set()
        over.wait(LONGEST_WAIT_S)

    try:
        with watching(filled) as shown:
            filled.answers["/api/pipeline/status"] = (200, hang)
            assert asking.wait(LONGEST_WAIT_S)
            shown.until("no answer for ")
            shown.type("4")
            shown.until("[4 memory]")
        assert shown.status == 0, "and it can be left"
    finally:
        over.set()


def test_a_pause_stops_the_looks(filled: Any) -> None:
    with watching(filled) as shown:
        shown.type(" ")
        shown.until("paused: Space goes on")
        before = len(filled.seen)
        shown.type("2")
        shown.until("[2 devices]")
        assert len(filled.seen) == before
        shown.type(" ")
        shown.until_not("paused")
        until(lambda: len(filled.seen) > before, "a look")


def test_a_window_that_changes_its_size(filled: Any) -> None:
    with watching(filled, width=120, height=40) as shown:
        shown.until("71°C")
        shown.terminal.screen.resize(24, 60)
        shown.size = Size(rows=24, columns=60)
        shown.until_not("71°C")
        shown.until("[1 overview] 2 devices  3 requests  4 memory  ? help  q quit")
        assert max(map(len, shown.lines)) <= 60
        assert len(shown.lines) == 24


@pytest.mark.parametrize("key", ["q", "\x03"])
def test_leaving_gives_the_terminal_back(filled: Any, key: str) -> None:
    watcher = Watcher(connecting(filled), SLOW_S)
    with dashboard_on(watcher, interval_s=SLOW_S) as shown:
        shown.until("q quit")
        shown.type(key)
        until(lambda: shown.status is not None, "the end")
    assert shown.status == 0
    assert given_back(shown.written)
    assert not shown.text.strip(), "nothing of it is left on the screen"


def test_an_error_of_ours_gives_the_terminal_back_and_is_raised(filled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with watching(filled) as shown:
        monkeypatch.setattr(screen_module, "frame", lambda *arguments: 1 / 0)
        until(lambda: shown.error is not None, "the end")
    assert isinstance(shown.error, ZeroDivisionError)
    assert given_back(shown.written)


def test_an_error_at_the_first_picture_gives_the_terminal_back(filled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen_module, "frame", lambda *arguments: 1 / 0)
    with dashboard_on(Watcher(connecting(filled), SLOW_S)) as shown:
        until(lambda: shown.error is not None, "the end")
    assert isinstance(shown.error, ZeroDivisionError)
    assert LEFT in shown.written or ENTERED not in shown.written


def test_an_error_of_a_key_gives_the_terminal_back(filled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with watching(filled) as shown:
        monkeypatch.setattr(shown.screen._controls.__class__, "press", lambda *arguments: 1 / 0)
        shown.type("2")
        until(lambda: shown.error is not None, "the end")
    assert isinstance(shown.error, ZeroDivisionError)
    assert given_back(shown.written)


def test_an_error_of_the_watcher_gives_the_terminal_back(filled: Any) -> None:
    watcher = Watcher(connecting(filled), QUICK_S)
    watcher._trend.add = lambda look: 1 / 0  # type: ignore[method-assign,assignment]
    with dashboard_on(watcher) as shown:
        until(lambda: shown.error is not None, "the end")
    assert isinstance(shown.error, ZeroDivisionError)
    assert LEFT in shown.written or ENTERED not in shown.written


def test_a_terminal_that_nobody_types_at_any_more(filled: Any) -> None:
    with watching(filled) as shown:
        shown.hang_up()
        until(lambda: shown.status is not None or shown.error is not None, "the end")
    assert (shown.status, shown.error) == (0, None)
    assert given_back(shown.written)


def test_a_look_changes_a_few_characters_not_the_screen(filled: Any) -> None:
    """Over a slow connection this is what one feels."""
    with watching(filled, colors=False) as shown:
        shown.until("[1 overview]")
        before, looks = len(shown.written), len(filled.seen)
        until(lambda: len(filled.seen) > looks + 60, "ten looks")
        written = len(shown.written) - before
    assert written < 10 * 80 * 24 / 4
