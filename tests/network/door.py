"""A listener on loopback, and what has come to it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

from core.network.certificates import Identity
from core.network.connection import Connection
from core.network.handshake import Hello, derive_key
from core.network.listener import Listener

TOKEN = "a-token-of-a-cluster"
KEY, OTHER_KEY = derive_key(TOKEN), derive_key(TOKEN + "!")
MASTER, WORKER = "a" * 32, "b" * 32
LONGEST_S = 60.0


class Door:
    """A listener, and whom it has welcomed and refused. With an `identity` it encrypts."""

    def __init__(self, admit: Callable[..., Any] | None = None, identity: Identity | None = None) -> None:
        self.welcomed: list[tuple[Hello, str]] = []
        self.refused: list[str] = []
        self.connections: list[Connection] = []
        self._changed = threading.Condition()
        self.listener = Listener("127.0.0.1", 0, KEY, MASTER, self._take, admit, self._refuse, identity)
        self.listener.start()

    def _take(self, connection: Connection, hello: Hello, address: str) -> None:
        with self._changed:
            self.connections.append(connection)
            self.welcomed.append((hello, address))
            self._changed.notify_all()

    def _refuse(self, address: str, reason: str) -> None:
        with self._changed:
            self.refused.append(reason)
            self._changed.notify_all()

    def wait_for(self, count: int) -> None:
        """Until so many have been welcomed."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.welcomed) >= count, LONGEST_S)

    def refusal(self) -> str:
        """The first one."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.refused, LONGEST_S)
            return self.refused[0]

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.listener.port), timeout=LONGEST_S)

    def close(self) -> None:
        self.listener.close()
        for connection in self.connections:
            connection.close()


def left(sock: socket.socket) -> bool:
    """Read to the end, which is a reset where something was sent that nobody read."""
    sock.settimeout(LONGEST_S)
    try:
        while sock.recv(1024):
            pass
    except ConnectionResetError:
        pass
    return True
