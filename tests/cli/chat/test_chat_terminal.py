"""`vramancer run` as a program on a terminal of its own, with a server that answers."""

from __future__ import annotations

import signal
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli.fake_server import events, serves
from steering import LONGEST_WAIT_S, until

pytest.importorskip("fcntl", reason="POSIX terminals")

from cli.terminal_program import TerminalProgram


@pytest.fixture
def program(tmp_path: Path, server: Any) -> Iterator[TerminalProgram]:
    serves(
        server, "tiny", "# He", "ad\n\nwith **bo", "ld** words and a long line that does not fit ", "into its width\n"
    )
    started = TerminalProgram(tmp_path, "run", "--url", server.url, width=60, height=40)
    yield started
    started.close()


def test_a_session(program: TerminalProgram, tmp_path: Path) -> None:
    until(lambda: program.shows("tiny: /help lists commands"), "the banner")
    program.type('"""one\r')
    until(lambda: program.shows("..."), "the next line")
    program.type('two"""\r')
    until(lambda: program.shows("4 tokens"), "an answer")
    assert "\nHead\n\nwith bold words and a long line that does not fit into its\nwidth\n4 tokens, " in program.text
    until(program.takes_keys, "the next question")
    program.type("half a question\x03")
    until(lambda: program.shows("Ctrl-C again, or Ctrl-D, leaves"), "the question whether to leave")
    assert program.process.poll() is None
    program.type("/bye\r")
    until(lambda: program.shows("/bye") and program.process.poll() is not None, "the end")
    assert program.process.wait() == 0
    history = tmp_path / ".local" / "state" / "vramancer" / "chat-history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert '+"""one\n+two"""\n' in history.read_text()


def test_ctrl_c_stops_an_answer_that_hangs(program: TerminalProgram, server: Any) -> None:
    over = threading.Event()

    def hang(file: Any) -> None:
        file.write(events({"choices": [{"delta": {"content": "So far"}}], "usage": {"completion_tokens": 2}}))
        file.flush()
        over.wait(LONGEST_WAIT_S)

    server.answers["/v1/chat/completions"] = (200, hang)
    try:
        until(lambda: program.shows("tiny: /help lists commands"), "the banner")
        program.type("Hi\r")
        until(lambda: program.shows("So far"), "the first words")
        program.process.send_signal(signal.SIGINT)
        until(lambda: program.shows(", stopped"), "the stop")
    finally:
        over.set()
    until(program.takes_keys, "the next question")
    program.type("\x04")
    until(lambda: program.shows("So far\n2 tokens") and program.process.poll() is not None, "the end")
    assert program.process.wait() == 0
