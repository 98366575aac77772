"""The port that other nodes come to: one thread, an event loop in it, and no thread for whoever has not proved itself.

A connection that is silent, slow, or says something else costs a socket for at most `GREETING_S`. Of connections in the
handshake there are at most `MAX_GREETING`; one more ends the oldest, so a crowd of silent ones keeps nobody out for
longer than it takes to try again.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable
from functools import partial

import structlog

from core.errors import ClusterRefusedError, NetworkError
from core.network.certificates import Identity
from core.network.connection import Connection
from core.network.greeting import answer
from core.network.handshake import Hello

MAX_GREETING = 256
_BACKLOG = 512
_PAUSE_S = 0.05
"""After an accept that failed, as it does while descriptors are short."""

logger = structlog.get_logger(__name__)

Admit = Callable[[Hello, str], Awaitable[None]]
"""May refuse a caller that has proved itself, by `ClusterRefusedError`; the second is its address."""
Refused = Callable[[str, str], None]
"""Hears of a caller that was refused: its address, and why. Called in the loop: it must not wait."""
Welcomed = Callable[[Connection, Hello, str], None]
"""Takes a connection whose handshake is over. Called in the loop: it must not wait."""


class Listener:
    """Listens from `start` to `close`. `port` 0 takes any that is free; `port` says which."""

    def __init__(
        self, host: str, port: int, key: bytes, node: str, welcomed: Welcomed, admit: Admit | None = None,
        refused: Refused = lambda address, reason: None, identity: Identity | None = None,
    ) -> None:  # fmt: skip
        """With an `identity` all connections are encrypted. Raises `OSError` if the address cannot be had."""
        self._key, self._node, self._identity = key, node, identity
        self._welcomed, self._admit, self._refused = welcomed, admit, refused
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        self._socket.setblocking(False)
        self.host = host
        self.port: int = self._socket.getsockname()[1]
        self._greeting: dict[asyncio.Task[bool], None] = {}
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="vrm-cluster-listener", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Take no more; whoever is in the handshake is left."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()
        else:
            self._socket.close()
            self._loop.close()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._listen())
        finally:
            self._socket.close()
            self._loop.close()

    async def _listen(self) -> None:
        accepting = self._loop.create_task(self._accept())
        await self._stop.wait()
        tasks = [accepting, *self._greeting]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self) -> None:
        while True:
            try:
                sock, address = await self._loop.sock_accept(self._socket)
            except OSError as error:
                logger.warning("a node could not be accepted", reason=error.strerror or str(error))
                await asyncio.sleep(_PAUSE_S)
                continue
            sock.setblocking(False)
            if len(self._greeting) >= MAX_GREETING:
                next(iter(self._greeting)).cancel()
            task = self._loop.create_task(self._greet(sock, address[0]))
            self._greeting[task] = None
            task.add_done_callback(partial(self._greeted, sock))

    def _greeted(self, sock: socket.socket, task: asyncio.Task[bool]) -> None:
        """A task is over, or was ended, perhaps before it had begun."""
        del self._greeting[task]
        failed = None if task.cancelled() else task.exception()
        if failed is not None:
            logger.error("a connection could not be taken in", exc_info=failed)
        if task.cancelled() or failed is not None or not task.result():
            sock.close()

    async def _greet(self, sock: socket.socket, address: str) -> bool:
        """Whether somebody else has the connection now."""

        async def admit(hello: Hello) -> None:
            if self._admit is not None:
                await self._admit(hello, address)

        try:
            hello, connection = await answer(sock, self._key, self._node, admit, identity=self._identity)
        except ClusterRefusedError as error:
            logger.warning("a node was refused", address=address, reason=error.message)
            self._refused(address, error.message)
            return False
        except NetworkError as error:
            logger.debug("a connection to the cluster's port came to nothing", address=address, reason=error.message)
            return False
        self._welcomed(connection, hello, address)
        return True
