"""uvicorn's HTTP protocol with a deadline for all that a client has to do, and bounds on all that it may send.

A connection *waits* whenever it is the client's turn: for a head, for the rest of a body that was refused, for the next
request. What waits costs no thread, is closed at its deadline, and gives way, oldest first, to new connections once
there are too many.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from core.errors import InvalidRequestError
from vramancer.web.limits import DISCARD_S, KEEPALIVE_S, MAX_HEADER_BYTES, MAX_TARGET_BYTES, Limits

LEAVE_S = 2.0
BAD_REQUEST, TIMEOUT, TARGET_TOO_LONG, HEADERS_TOO_LARGE = 400, 408, 414, 431


class Config(uvicorn.Config):
    """uvicorn's configuration, and ours."""

    def __init__(self, app: Any, limits: Limits) -> None:
        super().__init__(
            app,
            http=GuardedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",  # what clients send wrongly is told to them
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=int(KEEPALIVE_S),
            timeout_graceful_shutdown=1,
            backlog=limits.max_connections,
        )
        self.limits = limits
        self.waiting: dict[GuardedProtocol, None] = {}


class GuardedProtocol(HttpToolsProtocol):
    """One connection."""

    _clock: asyncio.TimerHandle | None = None
    _write_clock: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _in_head = True
    _refusal: tuple[int, str] | None = None
    _leaving = False
    on_lost: Callable[[], None] | None = None
    """Called by the event loop before the socket is closed."""
    url = b""
    headers: list[tuple[bytes, bytes]] = []

    @property
    def _front(self) -> Config:
        return cast(Config, self.config)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait(self._front.limits.header_timeout_s)
        if len(self.connections) > self._front.limits.max_connections:
            next(iter(self._front.waiting)).transport.abort()  # this one, if all others are being answered

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_write_clock()
        if self.on_lost is not None:
            self.on_lost()
        super().connection_lost(exc)

    # -- what a client has to do -------------------------------------------------------------------------------

    def _wait(self, seconds: float) -> None:
        self._stop_waiting()
        self._front.waiting[self] = None
        self._clock = self.loop.call_later(seconds, self._too_slow)

    def _stop_waiting(self) -> None:
        self._front.waiting.pop(self, None)
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _too_slow(self) -> None:
        if self._in_head and self._head_bytes and not self._leaving and not self.transport.get_write_buffer_size():
            self._refusal = TIMEOUT, "The request did not come within the time that this server waits for one."
            self.send_400_response("")
        else:
            self.transport.abort()

    def pause_writing(self) -> None:
        """More is to be sent than the client has taken: it gets a while to take some."""
        super().pause_writing()
        self._stop_write_clock()
        self._write_clock = self.loop.call_later(self._front.limits.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_write_clock()
        super().resume_writing()

    def _stop_write_clock(self) -> None:
        if self._write_clock is not None:
            self._write_clock.cancel()
            self._write_clock = None

    # -- what a client may send --------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._leaving:
            return
        if self._in_head:
            if not self._head_bytes and not self._is_answering:
                self._wait(self._front.limits.header_timeout_s)
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEADER_BYTES and not self._leaving:
            status = self._too_large() or HEADERS_TOO_LARGE
            self._refusal = status, _REASONS[status]
            self.send_400_response("")

    @property
    def _is_answering(self) -> bool:
        """It is the server's turn; a client may send on, if only the line break that old ones put behind a body."""
        return not getattr(self.cycle, "response_complete", True)

    def _too_large(self) -> int | None:
        """The status for a head that is, as far as it has come."""
        if len(self.url) > MAX_TARGET_BYTES:
            return TARGET_TOO_LONG
        size = sum(len(name) + len(value) + 4 for name, value in self.headers)
        return HEADERS_TOO_LARGE if size > MAX_HEADER_BYTES else None

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {"vramancer": {"connection": self}}

    def on_headers_complete(self) -> None:
        if (status := self._too_large()) is not None:
            self._refusal = status, _REASONS[status]
            raise ValueError(status)  # which ends the parser's work, and is answered by `send_400_response`
        self._in_head = False
        self._stop_waiting()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head, self._head_bytes = True, 0
        if self.cycle.response_complete:  # the rest of a body that was refused
            self._wait(KEEPALIVE_S)

    def on_response_complete(self) -> None:
        whole = not self.cycle.more_body
        super().on_response_complete()
        if self.transport.is_closing() or not self.cycle.response_complete:
            return
        if self.expect_100_continue and not whole:  # nobody knows whether the body will come
            self.transport.close()
        self._wait(KEEPALIVE_S if whole else DISCARD_S)

    # -- pieces of an answer, past the event loop --------------------------------------------------------------

    def write_now(self, piece: bytes) -> bytes | None:
        """Write a piece of a streamed body at once: to wake the loop for each would cost more than the piece. Any
        thread, as long as nothing else is on its way and `on_lost` waits for it. Returns what the kernel did not take,
        to be given to `write_rest`; None if this connection has to be written to by the loop.
        """
        if sys.platform == "win32" or self.scheme == "https" or not self.cycle.chunked_encoding:
            return None
        if self.transport.is_closing() or self.transport.get_write_buffer_size():
            return None
        data = b"%x\r\n%b\r\n" % (len(piece), piece)
        try:
            return data[os.write(self.transport.get_extra_info("socket").fileno(), data) :]
        except BlockingIOError:
            return data
        except OSError:
            return b""  # the client is gone, of which the loop will hear

    def write_rest(self, rest: bytes) -> None:
        """What `write_now` has left. Loop thread only."""
        self.transport.write(rest)

    # -- answers that no application gives ---------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, in OpenAI's shape, and close. In the middle of an answer: only close."""
        if getattr(self.cycle, "response_started", False) and not self.cycle.response_complete:
            self.transport.abort()
            return
        status, text = self._refusal or (BAD_REQUEST, "This is not a valid HTTP request.")
        body = json.dumps(InvalidRequestError(text).to_openai()).encode() + b"\n"
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self._leave()

    def _leave(self) -> None:
        """Close, once the client has had time to read the answer: the kernel drops it if more comes than was read."""
        self._leaving = True
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self._wait(LEAVE_S)
        else:
            self.transport.close()


_REASONS = {
    TARGET_TOO_LONG: f"The path and query of a request may have {MAX_TARGET_BYTES} bytes.",
    HEADERS_TOO_LARGE: f"The headers of a request may have {MAX_HEADER_BYTES} bytes.",
}
