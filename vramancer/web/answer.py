"""What a WSGI application answers, on its way from the application's thread to the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

MAX_HELD_BYTES = 256 * 1024
"""An application that streams waits when its client is so far behind."""
REST = "rest"
"""Type of a message whose body is written as it is."""


class ClientGoneError(Exception):
    """The client closed its connection, or was closed because it did not read."""


class Answer:
    """`start`, `write`, `finish` and `fail` are the application's thread's; `messages` and `leave` are the loop's.

    `write_now` takes a piece past the loop while nothing else is on its way: see `GuardedProtocol.write_now`. An
    application that may not wait for its client gives up its thread as soon as its answer is made.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, write_now: Callable[[bytes], bytes | None], *, may_wait: bool
    ) -> None:
        self.failed = False
        self._may_wait = may_wait
        self._write_now = write_now
        self._idle = False  # the loop waits, and all that it was given is with the transport
        self._loop = loop
        self._changed = threading.Condition()
        self._ready = asyncio.Event()
        self._called = False
        self._begun = False
        self._head: dict[str, Any] | None = None
        self._messages: list[dict[str, Any]] = []
        self._held_bytes = 0
        self._ended = False
        self._gone = False

    def is_gone(self) -> bool:
        """Whether nobody waits for the answer. Any thread."""
        return self._gone

    def start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], None]:
        """WSGI's `start_response`. The head is sent with the first piece."""
        if exc_info is not None and self._begun:
            raise exc_info[1].with_traceback(exc_info[2])  # too late to answer anything else
        pairs = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        self._head = {"type": "http.response.start", "status": int(status[:3]), "headers": pairs}
        return self.write

    def write(self, piece: bytes) -> None:
        """Raises `ClientGoneError`."""
        if not piece:
            return
        self._put(piece, more=True)

    def finish(self) -> None:
        """Nothing more comes."""
        self._put(b"", more=False)

    def fail(self, body: bytes) -> None:
        """The application failed: `body`, JSON, is the answer. An answer that has begun breaks off."""
        with self._changed:
            self.failed = self._begun
            if not self._begun:
                self._head = None
                headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
                self._messages = [
                    {"type": "http.response.start", "status": 500, "headers": headers},
                    {"type": "http.response.body", "body": body, "more_body": False},
                ]
            self._ended = True
            self._wake()

    def _put(self, piece: bytes, *, more: bool) -> None:
        with self._changed:
            while self._may_wait and self._held_bytes > MAX_HELD_BYTES and not self._gone:
                self._changed.wait()
            if self._gone:
                raise ClientGoneError
            if more and self._idle and self._begun and not self._messages:
                rest = self._write_now(piece)
                if rest == b"":
                    return
                if rest is not None:
                    self._messages.append({"type": REST, "body": rest})
                    self._held_bytes += len(rest)
                    self._wake()
                    return
            if self._head is not None:
                self._messages.append(self._head)
                self._head, self._begun = None, True
            self._messages.append({"type": "http.response.body", "body": piece, "more_body": more})
            self._held_bytes += len(piece)
            self._ended = not more
            self._wake()

    def _wake(self) -> None:
        if not self._called:
            self._called = True
            self._loop.call_soon_threadsafe(self._ready.set)

    async def messages(self) -> list[dict[str, Any]] | None:
        """What has come since the last call, waited for; None at the end."""
        with self._changed:
            self._idle = not self._messages
        await self._ready.wait()
        with self._changed:
            messages, self._messages = self._messages, []
            self._idle = False
            self._held_bytes = 0
            last = self._ended or self._gone
            if last and not messages:
                return None
            self._called = last
            if not last:
                self._ready.clear()
            self._changed.notify_all()
        return messages

    def leave(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._gone = True
            self._ready.set()
            self._changed.notify_all()
