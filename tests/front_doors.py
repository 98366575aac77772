"""The application behind the real front door, in a thread of the test."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flask import Flask
from steering import LONGEST_WAIT_S

from core.api.admission import admission_of
from core.security.admission import Admission
from vramancer.web.limits import Limits
from vramancer.web.listener import bind_socket
from vramancer.web.live import Live
from vramancer.web.server import FrontDoor

LIMITS = {
    "max_connections": 512,
    "max_body_bytes": 10 << 20,
    "max_waiting": 64,
    "header_timeout_s": LONGEST_WAIT_S,
    "body_timeout_s": LONGEST_WAIT_S,
    "write_timeout_s": LONGEST_WAIT_S,
    "drain_timeout_s": LONGEST_WAIT_S,
}


@contextmanager
def front_door(
    app: Any,
    admit: Callable[[Any], Admission] = lambda environ: Admission(granted=True, waits=True),
    live: Live | None = None,
    **limits: Any,
) -> Iterator[tuple[int, FrontDoor]]:
    """A WSGI application on a free loopback port, and its front door. Everything has ended afterwards."""
    ready = threading.Event()
    with bind_socket("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        door = FrontDoor(app, admit, Limits(**{**LIMITS, **limits}), ready.set, live)
        thread = threading.Thread(target=door.run_until_stopped, args=(listener,), name="front door")
        thread.start()
        try:
            assert ready.wait(LONGEST_WAIT_S)
            yield port, door
        finally:
            door.stop()
            thread.join(2 * LONGEST_WAIT_S)
            assert not thread.is_alive()


@contextmanager
def serving(app: Flask, **limits: Any) -> Iterator[int]:
    """Ours on a free loopback port."""
    with front_door(app, admission_of(app), **limits) as (port, _):
        yield port
