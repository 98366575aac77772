"""A program of ours on a terminal of its own."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import os
import select
import struct
import subprocess
import sys
import termios
from pathlib import Path

from scripts.captures import Terminal

REPOSITORY = Path(__file__).parents[2]


class TerminalProgram:
    """`vramancer` with these arguments, in an emulated terminal that answers where the cursor is, as terminals do. The
    terminal is the one that controls it: when it goes, the program is told."""

    def __init__(
        self, home: Path, *arguments: str, width: int = 80, height: int = 24, variables: dict[str, str] | None = None
    ) -> None:
        self._master, self._slave = os.openpty()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("VRM_", "XDG_"))}
        for name in ("NO_COLOR", "COLUMNS", "LINES", "FORCE_COLOR"):
            inherited.pop(name, None)
        environment = {**inherited, "HOME": str(home), "TERM": "xterm-256color", **(variables or {})}
        self._set_size(width, height)
        self.before = termios.tcgetattr(self._slave)
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, *arguments],
            stdin=self._slave, stdout=self._slave, stderr=self._slave, env=environment, cwd=REPOSITORY,
            start_new_session=True,
        )  # fmt: skip
        self.terminal = Terminal(width, height)
        self.terminal.screen.write_process_input = lambda data: os.write(self._master, data.encode())
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def resize(self, width: int, height: int) -> None:
        """As when somebody drags the window's corner."""
        self.terminal.screen.resize(height, width)
        self._set_size(width, height)

    def _set_size(self, width: int, height: int) -> None:
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def shows(self, text: str) -> bool:
        """Whether the screen has it, after what has come by now."""
        self.look()
        return text in self.terminal.text

    def look(self) -> None:
        """Take what has come."""
        ready, _, _ = select.select([self._master], [], [], 0.01)
        if ready:
            with contextlib.suppress(OSError):  # the program has ended
                self.terminal.write(self._decoder.decode(os.read(self._master, 65536)))

    def ended(self) -> bool:
        """Whether it has, after what has come by now."""
        self.look()
        return self.process.poll() is not None

    @property
    def text(self) -> str:
        return self.terminal.text

    @property
    def written(self) -> str:
        """All that it has written to the terminal so far."""
        return self.terminal.getvalue()

    def attributes(self) -> list[object]:
        """How the terminal treats what is typed; the program's end must find it as it was."""
        return termios.tcgetattr(self._slave)

    def takes_keys(self) -> bool:
        """Whether each key reaches the program: until then the terminal makes lines, and signals, of what is typed."""
        self.look()
        return not termios.tcgetattr(self._slave)[3] & termios.ICANON

    def hang_up(self) -> None:
        """As when the connection to a remote terminal breaks."""
        for descriptor in ("_slave", "_master"):
            os.close(getattr(self, descriptor))
            setattr(self, descriptor, -1)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for descriptor in (self._slave, self._master):
            if descriptor >= 0:
                os.close(descriptor)


_START = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from vramancer.main import main
main()
"""
