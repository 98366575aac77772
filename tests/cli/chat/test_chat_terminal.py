"""`vramancer run` as a program on a terminal of its own, with a server that answers."""

from __future__ import annotations

import codecs
import contextlib
import os
import select
import signal
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli.fake_server import events, serves
from steering import LONGEST_WAIT_S, until

from scripts.captures import Terminal

REPOSITORY = Path(__file__).parents[3]
WIDTH, HEIGHT = 60, 40

fcntl = pytest.importorskip("fcntl", reason="POSIX terminals")
termios = pytest.importorskip("termios", reason="POSIX terminals")


class Program:
    """`vramancer run` in a terminal that answers where the cursor is, as terminals do."""

    def __init__(self, home: Path, url: str) -> None:
        self._master, slave = os.openpty()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("VRM_", "XDG_"))}
        inherited.pop("NO_COLOR", None)
        environment = {
            **inherited,
            "HOME": str(home),
            "TERM": "xterm-256color",
            "COLUMNS": str(WIDTH),
            "LINES": str(HEIGHT),
        }
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vramancer.main", "run", "--url", url],
            stdin=slave, stdout=slave, stderr=slave, env=environment, cwd=REPOSITORY,
        )  # fmt: skip
        os.close(slave)
        self._terminal = Terminal(WIDTH, HEIGHT)
        self._terminal.screen.write_process_input = lambda data: os.write(self._master, data.encode())
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def shows(self, text: str) -> bool:
        """Whether the screen has it, after what has come by now."""
        ready, _, _ = select.select([self._master], [], [], 0.01)
        if ready:
            with contextlib.suppress(OSError):  # the program has ended
                self._terminal.write(self._decoder.decode(os.read(self._master, 65536)))
        return text in self._terminal.text

    @property
    def text(self) -> str:
        return self._terminal.text

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def program(tmp_path: Path, server: Any) -> Iterator[Program]:
    serves(
        server, "tiny", "# He", "ad\n\nwith **bo", "ld** words and a long line that does not fit ", "into its width\n"
    )
    started = Program(tmp_path, server.url)
    yield started
    started.close()


def test_a_session(program: Program, tmp_path: Path) -> None:
    until(lambda: program.shows("tiny: /help lists commands"), "the banner")
    program.type('"""one\r')
    until(lambda: program.shows("..."), "the next line")
    program.type('two"""\r')
    until(lambda: program.shows("4 tokens"), "an answer")
    assert "\nHead\n\nwith bold words and a long line that does not fit into its\nwidth\n4 tokens, " in program.text
    program.type("half a question\x03")
    until(lambda: program.shows("Ctrl-C again, or Ctrl-D, leaves"), "the question whether to leave")
    assert program.process.poll() is None
    program.type("/bye\r")
    until(lambda: program.shows("/bye") and program.process.poll() is not None, "the end")
    assert program.process.wait() == 0
    history = tmp_path / ".local" / "state" / "vramancer" / "chat-history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert '+"""one\n+two"""\n' in history.read_text()


def test_ctrl_c_stops_an_answer_that_hangs(program: Program, server: Any) -> None:
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
    program.type("\x04")
    until(lambda: program.shows("So far\n2 tokens") and program.process.poll() is not None, "the end")
    assert program.process.wait() == 0
