"""Runs the WSGI application on uvicorn until it is told to stop: one event loop, in the main thread.

While it stops, running requests go on, new ones are refused at once, and the listener stays open until all are done.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from core.logs import get_logger
from vramancer.web.bridge import Bridge
from vramancer.web.limits import Limits
from vramancer.web.live import Live
from vramancer.web.protocol import Config

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication, WSGIEnvironment

    from core.security.admission import Admission

log = get_logger(__name__)

INTERRUPTED = 130
"""What shells report for a program ended by Ctrl-C."""
CHECK_S = 0.05
SWITCH_S = 0.0005
"""How long a thread may keep the interpreter from others that want it. Python's own 5 ms are a step of a small model:
each busy thread would add them to the engine's step."""


class FrontDoor(uvicorn.Server):
    """Answers requests to `app` until it is stopped, then lets running ones finish. `live` is what pages watch."""

    def __init__(
        self,
        app: WSGIApplication,
        admit: Callable[[WSGIEnvironment], Admission],
        limits: Limits,
        on_ready: Callable[[], None] = lambda: None,
        live: Live | None = None,
    ) -> None:
        self._bridge = Bridge(app, admit, limits, live)
        super().__init__(Config(self._bridge, limits))
        self._limits = limits
        self._on_ready = on_ready
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def run_until_stopped(self, listener: socket.socket) -> None:
        """Listen on a bound socket until `stop`, or Ctrl-C or SIGTERM if this is the main thread, and return once
        running requests have finished, or after `drain_timeout_s`. A second signal ends the process at once.

        `on_ready` is called when connections are accepted and signals are handled.
        """
        before_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        try:
            asyncio.run(self.serve([listener]))
        finally:
            sys.setswitchinterval(before_s)
            self._bridge.close()

    def stop(self) -> None:
        """Drain, then return from `run_until_stopped`. Any thread; once `on_ready` has been called."""
        if self._loop is not None and not self._stopping:
            self._stopping = True
            asyncio.run_coroutine_threadsafe(self._drain(), self._loop)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM stops, the second exits."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._handle)
        yield

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._stopping:
            os._exit(INTERRUPTED)
        note = f"\nstopping: running requests get {self._limits.drain_timeout_s:g} s; once more to exit at once\n"
        os.write(2, note.encode())  # unbuffered: a signal may come in the middle of a print
        if self._loop is not None:
            self.stop()
        else:
            self._stopping = self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._on_ready()

    async def _drain(self) -> None:
        self._bridge.drain()
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self._limits.drain_timeout_s
        while self._bridge.num_open and loop.time() < deadline_s:
            await asyncio.sleep(CHECK_S)
        if self._bridge.num_open:
            log.warning("requests are cut off", requests=self._bridge.num_open)
            for connection in list(self.server_state.connections):
                connection.transport.abort()
        self.should_exit = True
