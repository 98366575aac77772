"""Requests that are made again and again: over one connection, and none takes longer than it may."""

from __future__ import annotations

import http.client
import io
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, cast

import msgspec

from core.errors import UnavailableError
from vramancer.cli.client import ApiClient

WITHIN_S = 5.0
"""Longest that a request may take."""

Answer = TypeVar("Answer")


class KeptClient(ApiClient):
    """Keeps its connection, for one thread. A request ends within `within_s`, however slowly the server answers; `end`
    ends it at once, from any thread, and there are no further ones."""

    def __init__(self, url: str, token: str | None, *, within_s: float = WITHIN_S) -> None:
        super().__init__(url, token)
        self._within_s = within_s
        self._kept: http.client.HTTPConnection | None = None
        self._socket: _BoundedSocket | None = None
        self._ended = False

    def ask(self, path: str, kind: type[Answer]) -> Answer:
        """What GET `path` answers, as a `kind`. Raises `UnavailableError` where it answers something else."""
        with self._request("GET", path, None) as response:
            body = response.read()
        try:
            return msgspec.json.decode(body, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UnavailableError(f"{self.url}{path} answers what this version does not know: {error}.") from error

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._kept is not None:
            self._kept.close()
        self._kept = self._socket = None

    def end(self) -> None:
        """Make no further request, and give up the one under way."""
        self._ended = True
        bounded = self._socket
        if bounded is not None:
            bounded.interrupt()

    @contextmanager
    def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        deadline_s = time.monotonic() + (timeout_s or self._within_s)
        try:
            yield self._answered(method, path, body, deadline_s)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise self._unanswered(error) from error
        except BaseException:
            self.close()  # an answer may be there that nobody has read
            raise

    def _answered(
        self, method: str, path: str, body: Mapping[str, Any] | None, deadline_s: float
    ) -> http.client.HTTPResponse:
        """A connection that the server has closed meanwhile shows as such when it is used: then another is opened."""
        kept = self._kept is not None and self._kept.sock is not None
        try:
            return self._exchange(self._open(deadline_s), method, path, body)
        except ConnectionError:
            if not kept or method != "GET":
                raise
        self.close()
        return self._exchange(self._open(deadline_s), method, path, body)

    def _open(self, deadline_s: float) -> http.client.HTTPConnection:
        if self._ended:
            raise OSError("it is not asked any more")
        if self._kept is None or self._kept.sock is None:
            self._kept = self._connection(max(0.001, deadline_s - time.monotonic()))
            self._kept.connect()
            self._socket = _BoundedSocket(self._kept.sock)
            self._kept.sock = cast(socket.socket, self._socket)
        assert self._socket is not None
        self._socket.deadline_s = deadline_s
        return self._kept


class _BoundedSocket:
    """What `http.client` uses of a connected socket. No wait goes on beyond `deadline_s`."""

    def __init__(self, connected: socket.socket) -> None:
        self.deadline_s = 0.0
        self._socket = connected

    def sendall(self, data: bytes) -> None:
        self.in_time().sendall(data)

    def makefile(self, mode: Literal["rb"]) -> io.BufferedReader:
        return io.BufferedReader(_Incoming(self, self._socket.makefile(mode, buffering=0)))

    def close(self) -> None:
        """What has been made of it can be read on."""
        self._socket.close()

    def interrupt(self) -> None:
        """Whoever waits for it sees its end."""
        try:
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
        except OSError:
            return  # it has ended already

    def in_time(self) -> socket.socket:
        """The socket, with the time that is left as its timeout."""
        left_s = self.deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(left_s)
        return self._socket


class _Incoming(io.RawIOBase):
    """What comes in, in time."""

    def __init__(self, bounded: _BoundedSocket, raw: Any) -> None:
        super().__init__()
        self._bounded = bounded
        self._raw = raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._bounded.in_time()
        return cast("int | None", self._raw.readinto(buffer))

    def close(self) -> None:
        self._raw.close()
        super().close()
