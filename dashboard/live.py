"""Live data over Socket.IO: one look at the server for all viewers, its differences to each.

Everything here runs in the event loop, so a viewer holds no thread. What watches has a session, and proves with every
request that it is one of the dashboard's pages. A viewer that does not fetch what there is for it is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs

import socketio

from core.errors import (
    AuthenticationError,
    InvalidRequestError,
    QueueFullError,
    VRAMancerError,
)
from core.security.access import Environ
from dashboard.gate import Gate
from dashboard.poller import Poller, Publish
from dashboard.snapshot import Patch, Snapshot

PATH = "/socket.io/"
MAX_BODY_BYTES = 1024
"""Viewers send next to nothing."""
PING_S = 20
PONG_S = 20
MAX_UNREAD = 12
"""Messages that may wait for a viewer to fetch them."""
KEPT_S = 300
"""Seconds of which a new viewer gets the curve."""
FRESH_S = 5.0
RETRY_AFTER_S = 10.0
_SESSION = "vramancer_session"
_PACKETS = re.compile(r"(?:(?:40(?:\{\})?|41|3|1)(?:\x1e|$))+")
"""Engine.IO's pong and close, Socket.IO's connect and disconnect: all that a viewer has to say."""

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class LiveHub:
    """Loop thread only, but for `end`. `make_poller` makes what looks at the server, told where to publish."""

    path = PATH
    max_body_bytes = MAX_BODY_BYTES

    def __init__(self, gate: Gate, make_poller: Callable[[Publish], Poller], max_viewers: int) -> None:
        self._gate = gate
        self._make_poller = make_poller
        self._max_viewers = max_viewers
        logger = logging.getLogger(__name__ + ".engine")
        logger.setLevel(logging.ERROR)  # it would tell each message, and what clients send wrongly is told to them
        self._server = socketio.AsyncServer(
            async_mode="asgi",
            always_connect=True,  # the first word that a viewer hears is that it is connected
            async_handlers=False,
            cors_allowed_origins=[],  # whose page it is, the gate judges
            transports=["polling"],
            allow_upgrades=False,
            http_compression=False,
            max_http_buffer_size=MAX_BODY_BYTES,
            cookie=None,
            ping_interval=PING_S,
            ping_timeout=PONG_S,
            logger=logger,
            engineio_logger=logger,
        )
        self._server.on("connect", self._connected)
        self._server.on("disconnect", self._left)
        self._fetching: dict[str, object] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._publishing = asyncio.Lock()
        self._poller: Poller | None = None
        self._ended: list[Poller] = []
        self._viewers: set[str] = set()
        self._current: Snapshot | None = None
        self._looked_s = 0.0
        self._number = 0
        self._history: deque[list[float | None]] = deque(maxlen=KEPT_S)

    # -- requests --------------------------------------------------------------------------------------------------

    def admit(self, environ: Environ) -> VRAMancerError | None:
        """Why a request may not go on, by its head alone."""
        try:
            session = self._gate.watcher(environ)
        except VRAMancerError as error:
            return error
        if session is None:
            return AuthenticationError("Sign in to the dashboard first.", code="not_signed_in")
        viewer = _viewer(environ["QUERY_STRING"])
        if viewer is None:
            if environ["REQUEST_METHOD"] != "GET":
                return InvalidRequestError("A viewer begins with GET.")
            if len(self._server.eio.sockets) >= self._max_viewers:
                return QueueFullError(
                    f"{self._max_viewers} pages watch already, as many as this server lets (dashboard.max_viewers).",
                    retry_after_s=RETRY_AFTER_S,
                )
        elif self._session_of(viewer) != session.key:
            return InvalidRequestError("There is no such viewer (any more).", code="unknown_viewer")
        elif environ["REQUEST_METHOD"] == "GET" and viewer in self._fetching:
            return InvalidRequestError("This viewer waits for news already.")
        return None

    async def answer(self, scope: Scope, environ: Environ, body: bytes, send: Send) -> None:
        """An admitted request, whose body has come. Cancelled when the client leaves, which ends its viewer."""
        self._loop = asyncio.get_running_loop()
        viewer = _viewer(environ["QUERY_STRING"])
        if environ["REQUEST_METHOD"] == "POST":
            self._check_said(body.decode("utf-8", "replace"), viewer)
        fetches = viewer is not None and environ["REQUEST_METHOD"] == "GET"
        session = self._gate.session(environ)
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            return messages.pop() if messages else {"type": "http.disconnect"}

        this = object()

        def fetched() -> None:
            if viewer is not None and self._fetching.get(viewer) is this:
                del self._fetching[viewer]

        if viewer is not None and fetches:
            self._fetching[viewer] = this
        try:
            plain = {**scope, _SESSION: session.key if session is not None else "", "headers": _plain(scope)}
            # the next one may come as soon as the answer is read, before `send` is back
            await self._server.handle_request(plain, receive, _guarded(send, fetched))
        finally:
            fetched()
            self._forget_closed(viewer)

    def _forget_closed(self, viewer: str | None) -> None:
        """A page that has said goodbye makes room for another one at once; the engine would keep it for a while."""
        sockets = self._server.eio.sockets
        if viewer in sockets and sockets[viewer].closed:
            del sockets[viewer]

    def _check_said(self, text: str, viewer: str | None) -> None:
        """The engine trusts what a viewer says more than it should: only what one has to say comes to it."""
        connects = text.count("40")
        again = connects and self._server.manager.sid_from_eio_sid(viewer, "/") is not None
        if _PACKETS.fullmatch(text) is None or connects > 1 or again:
            raise InvalidRequestError("A viewer says only that it is there.")

    def _session_of(self, viewer: str) -> str | None:
        environ = self._server.environ.get(viewer)
        return environ["asgi.scope"][_SESSION] if environ is not None else None

    # -- viewers ---------------------------------------------------------------------------------------------------

    async def _connected(self, sid: str, environ: Any, auth: Any) -> None:
        self._viewers.add(sid)
        fresh = self._current is not None and time.monotonic() - self._looked_s < FRESH_S
        if self._poller is None:
            self._poller = self._make_poller(self._publish_from_thread)
            self._poller.start()
            fresh = False  # its first patch has nothing to do with what there was before
        await self._server.enter_room(sid, "watching" if fresh else "new")
        if fresh:
            await self._server.emit("snapshot", self._whole(), to=sid)

    async def _left(self, sid: str, reason: str) -> None:
        self._viewers.discard(sid)
        if not self._viewers:
            self._stop_looking()

    def _stop_looking(self) -> None:
        if self._poller is not None:
            self._poller.stop()
            self._ended = [poller for poller in self._ended if poller.alive]
            self._ended.append(self._poller)
            self._poller = None

    @property
    def num_viewers(self) -> int:
        return len(self._viewers)

    # -- news ------------------------------------------------------------------------------------------------------

    def _publish_from_thread(self, snapshot: Snapshot, patch: Patch) -> None:
        loop, poller = self._loop, self._poller
        if loop is not None and poller is not None and not loop.is_closed():
            asyncio.run_coroutine_threadsafe(self._publish(poller, snapshot, patch), loop)

    async def _publish(self, poller: Poller, snapshot: Snapshot, patch: Patch) -> None:
        async with self._publishing:
            if poller is not self._poller:
                return
            self._current, self._looked_s = snapshot, time.monotonic()
            self._number += 1
            self._history.append(sample(snapshot))
            await self._drop_idle()
            await self._server.emit("patch", {"number": self._number, "patch": patch}, room="watching")
            new = [sid for sid, _ in self._server.manager.get_participants("/", "new")] if self._has_new() else []
            if new:
                await self._server.emit("snapshot", self._whole(), room="new")
            for sid in new:
                await self._server.leave_room(sid, "new")
                await self._server.enter_room(sid, "watching")

    def _has_new(self) -> bool:
        return "new" in self._server.manager.rooms.get("/", {})

    def _whole(self) -> dict[str, Any]:
        return {"number": self._number, "state": self._current, "history": list(self._history)}

    async def _drop_idle(self) -> None:
        """Viewers that do not fetch, and those whose session has ended."""
        for viewer, connection in list(self._server.eio.sockets.items()):
            session = self._session_of(viewer)
            signed_out = session is not None and not self._gate.sessions.has(session)
            if signed_out or connection.queue.qsize() > MAX_UNREAD:
                await self._drop(viewer)

    async def _drop(self, viewer: str) -> None:
        """End a viewer without waiting for it to fetch what there is, as the engine's own `disconnect` would."""
        connection = self._server.eio.sockets.pop(viewer, None)
        if connection is not None and not connection.closed:
            await connection.close(wait=False)

    # -- the end ---------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Let every viewer go: what they wait for is answered at once."""
        self._max_viewers = 0
        for viewer in list(self._server.eio.sockets):
            await self._drop(viewer)
        self._stop_looking()

    def end(self) -> None:
        """No thread is left. Once the loop has ended; safe to call twice."""
        self._stop_looking()
        for poller in self._ended:
            poller.join()
        self._ended.clear()


def sample(snapshot: Snapshot) -> list[float | None]:
    """A point of the curves: time, tokens per second, running, waiting, then for the first token and the time between
    tokens the 50th, 95th and 99th percentile in seconds."""
    batcher = snapshot.get("batcher") or {}
    latency = batcher.get("latency") or {}
    point = [snapshot["time"], *(batcher.get(key) for key in ("tokens_per_second", "running", "waiting"))]
    for kind in ("first_token", "between_tokens"):
        point += [(latency.get(kind) or {}).get(name) for name in ("p50", "p95", "p99")]
    return point


def _viewer(query: str) -> str | None:
    return parse_qs(query).get("sid", [None])[0]


def _plain(scope: Scope) -> list[tuple[bytes, bytes]]:
    """Without what the engine would act on and is none of its business: an upgrade, and whose page it is."""
    left_out = (b"upgrade", b"connection", b"origin", b"transfer-encoding", b"content-length")
    body_free = [(name, value) for name, value in scope["headers"] if name.lower() not in left_out]
    return [*body_free, (b"content-length", b"%d" % MAX_BODY_BYTES)]


def _guarded(send: Send, begun: Callable[[], None]) -> Send:
    async def send_guarded(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            begun()
            safe = [(b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff")]
            message = {**message, "headers": [*message["headers"], *safe]}
        await send(message)

    return send_guarded
