"""Whether the client is still there, asked of its socket: nothing else tells until something is written."""

from __future__ import annotations

import selectors
import socket
import ssl
from collections.abc import Callable
from typing import Any

_Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)


def disconnect_probe(environ: dict[str, Any]) -> Callable[[], bool]:
    """A function that says whether the client of this WSGI request has closed its side of the connection.

    gunicorn and werkzeug put the socket into the WSGI environment; without it the answer is always False. A client
    that closes only its sending side counts as gone, as it does for most proxies.
    """
    connection = environ.get("gunicorn.socket") or environ.get("werkzeug.socket")
    if not isinstance(connection, socket.socket) or isinstance(connection, ssl.SSLSocket):
        return lambda: False  # a TLS socket cannot be peeked at; a stream still notices when it writes
    return lambda: _closed(connection)


def _closed(connection: socket.socket) -> bool:
    try:
        with _Selector() as selector:
            selector.register(connection, selectors.EVENT_READ)
            if not selector.select(timeout=0):
                return False
        return connection.recv(1, socket.MSG_PEEK) == b""  # data would be the client's next request
    except (OSError, ValueError):  # reset, or the file descriptor is closed
        return True
