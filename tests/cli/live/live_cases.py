"""A server made up by the test, and the dashboard on an emulated terminal."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from prompt_toolkit.application import create_app_session
from prompt_toolkit.data_structures import Size
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.output.vt100 import Vt100_Output
from steering import LONGEST_WAIT_S, until

from scripts.captures import Terminal, example_facts
from scripts.live_example import answers
from vramancer.cli.live.connection import KeptClient
from vramancer.cli.live.screen import Screen
from vramancer.cli.live.watch import Watcher

QUICK_S = 0.01
"""Between two looks, where a test waits for them."""
CANCELLED = "/api/requests/chatcmpl-a81f3f0a77f64d0c9d-0/cancel"


def fill(server: Any, at_s: float = 0.0, **replaced: Any) -> None:
    """The fake server says what the example's does by then. `replaced`: other answers, by the last word of the path."""
    for path, answer in answers(example_facts(), at_s).items():
        answer = replaced.get(path.rpartition("/")[2], answer)
        server.answers[path] = (200, json.dumps(answer).encode())


def colors_in(written: str) -> set[int]:
    """Those numbers of what was written to a terminal that choose a colour."""
    numbers = {int(number or 0) for found in re.findall(r"\x1b\[([\d;]*)m", written) for number in found.split(";")}
    return {number for number in numbers if 30 <= number < 50 or 90 <= number < 108}


class Shown:
    """The dashboard's screen, while it runs in another thread."""

    def __init__(self, width: int, height: int) -> None:
        self._lock = threading.Lock()
        self.terminal = Terminal(width, height)
        self._write = self.terminal.write
        self.terminal.write = self._locked_write  # type: ignore[method-assign]
        self.size = Size(rows=height, columns=width)
        self.keys: PipeInput
        self.screen: Screen
        self.status: int | None = None
        self.error: BaseException | None = None

    def _locked_write(self, text: str) -> int:
        with self._lock:
            return self._write(text)

    @property
    def text(self) -> str:
        with self._lock:
            return self.terminal.text

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @property
    def written(self) -> str:
        with self._lock:
            return self.terminal.getvalue()

    def type(self, keys: str) -> None:
        self.keys.send_text(keys)

    def hang_up(self) -> None:
        """Nobody types any more. In the screen's own thread, which may close its keyboard at the same time."""
        loop = self.screen._app.loop
        assert loop is not None
        loop.call_soon_threadsafe(self.keys.close)

    def until(self, text: str) -> None:
        until(lambda: text in self.text or self.error, f"{text!r} on the screen:\n{self.text}")
        assert self.error is None, self.error

    def until_not(self, text: str) -> None:
        until(lambda: text not in self.text or self.error, f"no {text!r} on the screen:\n{self.text}")
        assert self.error is None, self.error


@contextmanager
def dashboard_on(
    watcher: Watcher, *, width: int = 80, height: int = 24, colors: bool = True, interval_s: float = QUICK_S
) -> Iterator[Shown]:
    """The dashboard of what `watcher` sees, until `q` is typed at the end."""
    shown = Shown(width, height)
    began = threading.Event()
    depth = ColorDepth.DEPTH_8_BIT if colors else ColorDepth.DEPTH_1_BIT

    def run() -> None:
        output = Vt100_Output(shown.terminal, lambda: shown.size, term="xterm-256color", default_color_depth=depth)
        with create_pipe_input() as keys, create_app_session(input=keys, output=output):
            shown.keys = keys
            try:
                shown.screen = Screen(watcher, shown.terminal.console(), interval_s)
                began.set()
                shown.status = shown.screen.run()
            except BaseException as error:  # noqa: BLE001 (the test looks at it)
                shown.error = error
            finally:
                began.set()

    thread = threading.Thread(target=run, name="vrm-test-screen")
    thread.start()
    assert began.wait(LONGEST_WAIT_S)
    try:
        yield shown
    finally:
        if thread.is_alive():
            with suppress(OSError):  # it is ending by itself
                shown.type("q" if shown.screen._controls.asking is None else "nq")
        thread.join(LONGEST_WAIT_S)
        assert not thread.is_alive()


def connecting(server: Any, token: str | None = "secret") -> Callable[[], KeptClient]:
    return lambda: KeptClient(server.url, token)


@contextmanager
def watching(
    server: Any, *, width: int = 80, height: int = 24, colors: bool = True, interval_s: float = QUICK_S
) -> Iterator[Shown]:
    """The dashboard of the fake server."""
    watcher = Watcher(connecting(server), interval_s)
    with dashboard_on(watcher, width=width, height=height, colors=colors, interval_s=interval_s) as shown:
        shown.until("q")
        yield shown
