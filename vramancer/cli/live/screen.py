"""The terminal while the dashboard has it: drawing, keys, and giving it back."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from prompt_toolkit.application import Application
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.layout import FormattedTextControl, Layout, Window
from prompt_toolkit.utils import suspend_to_background_supported
from rich.console import Console

from vramancer.cli.live.canvas import Canvas
from vramancer.cli.live.controls import ANY, KEYS, Act, Controls
from vramancer.cli.live.frame import frame
from vramancer.cli.live.paint import fragments
from vramancer.cli.live.watch import Watcher

_TICK_S = 1.0
_ENDS = ("SIGTERM", "SIGHUP")
"""Signals that end the program; those that the system does not have are left out."""


class Screen:
    """Shows what `watcher` sees until somebody leaves, on the terminal of prompt_toolkit's session."""

    def __init__(self, watcher: Watcher, console: Console, interval_s: float) -> None:
        self._watcher = watcher
        self._console = console
        self._interval_s = interval_s
        self._controls = Controls()
        self._ended_by = 0
        self._app: Application[None] = Application(
            Layout(Window(FormattedTextControl(self._drawn), always_hide_cursor=True)),
            key_bindings=self._bindings(),
            full_screen=True,
            erase_when_done=True,
        )

    def run(self) -> int:
        """Returns the exit status. However it ends, the terminal is as before."""
        self._watcher.start(self._app.invalidate)
        try:
            with self._ends_by_signals():
                self._app.run(pre_run=self._began, set_exception_handler=False)
        except EOFError:
            return 0  # nobody types any more
        except OSError:
            if not self._ended_by:
                raise  # else the terminal has gone
        finally:
            self._watcher.stop()
        if self._watcher.failure is not None:
            raise self._watcher.failure
        return 128 + self._ended_by if self._ended_by else 0

    def _drawn(self) -> StyleAndTextTuples:
        if self._watcher.failure is not None:
            self._leave()
            return []
        size = self._app.output.get_size()
        canvas = Canvas(self._console, size.columns)
        seen = self._watcher.seen
        self._controls.settle(seen)
        lines = frame(seen, self._controls, canvas, size.rows, self._interval_s, time.monotonic())
        return fragments(lines, self._console)

    def _leave(self) -> None:
        if self._app.is_running and not self._app.is_done:
            self._app.exit()

    def _began(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._failed)
        self._app.create_background_task(self._tick())

    def _failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """An error of ours: it ends the program, after the terminal has been given back."""
        error = context.get("exception")
        if error is None:
            loop.default_exception_handler(context)
        elif self._app.is_running and not self._app.is_done:
            self._app.exit(exception=error)

    async def _tick(self) -> None:
        """Times go on where no look comes."""
        while True:
            await asyncio.sleep(_TICK_S)
            if self._watcher.seen.trouble or self._watcher.seen.asked_s is not None:
                self._app.invalidate()

    def _bindings(self) -> KeyBindings:
        keys = KeyBindings()
        for key in KEYS:
            keys.add(" " if key == "space" else key, eager=key == "escape")(self._pressed(key))
        keys.add(Keys.Any)(self._pressed(ANY))

        @keys.add("c-c")
        @keys.add("<sigint>")
        def _(event: KeyPressEvent) -> None:
            self._leave()

        @keys.add("c-l")
        def _(event: KeyPressEvent) -> None:
            event.app.renderer.clear()

        @keys.add("c-z")
        def _(event: KeyPressEvent) -> None:
            if suspend_to_background_supported():
                event.app.suspend_to_background()

        return keys

    def _pressed(self, key: str) -> Callable[[KeyPressEvent], None]:
        def press(event: KeyPressEvent) -> None:
            asked = self._controls.press(key, self._watcher.seen)
            if asked is None:
                return
            act, request_id = asked
            if act is Act.LEAVE:
                self._leave()
            elif act is Act.PAUSE:
                self._watcher.pause()
            else:
                self._watcher.cancel(request_id, self._note)

        return press

    def _note(self, text: str) -> None:
        self._controls.note = text
        self._app.invalidate()

    @contextmanager
    def _ends_by_signals(self) -> Iterator[None]:
        """Leave as by a key, so that the terminal is given back. Only the main thread is told of signals."""
        before: dict[int, Any] = {}

        def end(number: int, _: object) -> None:
            self._ended_by = number
            loop = self._app.loop
            if loop is not None:
                loop.call_soon_threadsafe(self._leave)

        for name in _ENDS:
            if hasattr(signal, name) and threading.current_thread() is threading.main_thread():
                number = getattr(signal, name)
                before[number] = signal.signal(number, end)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
