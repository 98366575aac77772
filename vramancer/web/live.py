"""Requests that wait for news in the event loop, and hold no thread: bodies are small and have their time, and whoever
leaves is noticed at once.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol

from core.errors import PayloadTooLargeError, RequestTimeoutError, VRAMancerError
from core.logs import get_logger

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

    from vramancer.web.protocol import GuardedProtocol

log = get_logger(__name__)

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Live(Protocol):
    """What answers such requests."""

    path: str
    max_body_bytes: int

    def admit(self, environ: WSGIEnvironment) -> VRAMancerError | None:
        """Why a request may not go on, by its head. Quick; raises nothing."""

    async def answer(self, scope: dict[str, Any], environ: WSGIEnvironment, body: bytes, send: Send) -> None:
        """Answer one that may. Raises `VRAMancerError` before anything is sent; cancelled when the client leaves."""

    async def close(self) -> None:
        """Answer all that wait, and take no more."""

    def end(self) -> None:
        """After the loop has ended: leave no thread behind."""


class LiveMount:
    """Guards a `Live`. Loop thread only, but for `end`."""

    def __init__(self, live: Live, body_timeout_s: float) -> None:
        self._live = live
        self._body_timeout_s = body_timeout_s
        self._refusal: VRAMancerError | None = None
        self._closing: asyncio.Task[None] | None = None

    def answers(self, path: str) -> bool:
        return path.startswith(self._live.path)

    def close(self, refusal: VRAMancerError) -> None:
        """Let everybody go; what comes is answered with `refusal`."""
        self._refusal = refusal
        self._closing = asyncio.ensure_future(self._live.close())

    def end(self) -> None:
        self._live.end()

    async def __call__(self, scope: dict[str, Any], environ: WSGIEnvironment, receive: Receive, send: Send) -> None:
        connection: GuardedProtocol = scope["extensions"]["vramancer"]["connection"]
        work = asyncio.ensure_future(self._answer(scope, environ, receive, send))

        def leave() -> None:
            work.cancel()

        connection.on_lost = leave
        try:
            await asyncio.wait([work])
        finally:
            if connection.on_lost is leave:  # the connection's next request may have come meanwhile
                connection.on_lost = None
            work.cancel()  # does nothing to what is done
        if not work.cancelled() and (error := work.exception()) is not None:
            log.error("a viewer's request failed unexpectedly", error=repr(error), exc_info=error)
            connection.transport.abort()

    async def _answer(self, scope: dict[str, Any], environ: WSGIEnvironment, receive: Receive, send: Send) -> None:
        refusal = self._refusal or self._live.admit(environ)
        if refusal is None:
            try:
                body = await asyncio.wait_for(self._body(receive), self._body_timeout_s)
                if body is not None:
                    await self._live.answer(scope, environ, body, send)
            except asyncio.TimeoutError:
                refusal = RequestTimeoutError("The body did not come in time.")
            except VRAMancerError as error:
                refusal = error
        if refusal is not None:
            await _refuse(refusal, send)

    async def _body(self, receive: Receive) -> bytes | None:
        """The whole body; None if the client has left. Raises `PayloadTooLargeError`."""
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            piece: bytes = message["body"]
            body += piece
            if len(body) > self._live.max_body_bytes:
                raise PayloadTooLargeError(f"A body may have {self._live.max_body_bytes} bytes here.")
            if not message["more_body"]:
                return body


async def _refuse(error: VRAMancerError, send: Send) -> None:
    body = json.dumps(error.to_openai()).encode() + b"\n"
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-store"),
    ]
    if error.retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s))))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
