"""HTTP to other servers. One event loop in a thread of its own moves the bytes; whoever asked takes them from a queue.

A thread that waits for a silent server cannot notice that its own client has left, nor be interrupted. So the loop does
the waiting, where a call can be cancelled at any time, which closes its connection.
"""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from core.errors import UpstreamError, UpstreamTimeoutError, VRAMancerError
from core.logs import get_logger

if sys.version_info >= (3, 11):
    import httpx2 as httpx
else:
    import httpx

log = get_logger(__name__)

PIECES_AHEAD = 16
"""Pieces of an answer (at most 64 KiB each) that may wait for a slow client; the server is read no further then."""
REST_S = 1.0
"""How long the end of an answer may take whose last event was read. In time, the connection can be used again."""
KEPT_CONNECTIONS = 32


@dataclass(frozen=True, slots=True)
class Head:
    """The beginning of an answer. Names of `headers` are in lower case."""

    status: int
    headers: Mapping[str, str]

    @property
    def media_type(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds to connect, and of silence before and within an answer."""

    connect_s: float
    read_s: float


class End:
    """Nothing comes after it."""


END = End()


class Exchange:
    """One request: its head, pieces of its body, then `END`. Close it, whatever has come."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: queue.SimpleQueue[Head | bytes | End | VRAMancerError] = queue.SimpleQueue()
        self._room = asyncio.Semaphore(PIECES_AHEAD)
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def next(self, wait_s: float) -> Head | bytes | End | None:
        """What comes next; None if nothing did within `wait_s`. Raises `UpstreamError`."""
        try:
            item = self._queue.get(timeout=wait_s)
        except queue.Empty:
            return None
        if isinstance(item, VRAMancerError):
            raise item
        if isinstance(item, bytes):
            self._call(self._room.release)
        return item

    def close(self, *, rest: bool = False) -> None:
        """End it; with `rest`, its last bytes may still come. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self._call(self._let_end if rest else self._cancel)

    def _call(self, function: Any) -> None:
        with suppress(RuntimeError):  # the loop has ended, and all calls with it
            self._loop.call_soon_threadsafe(function)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _let_end(self) -> None:
        for _ in range(PIECES_AHEAD):
            self._room.release()
        self._loop.call_later(REST_S, self._cancel)

    def begin(self, client: Any, request: Any, tasks: set[asyncio.Task[None]]) -> None:
        """In the loop. The task is one of `tasks` until it has ended."""
        self._task = self._loop.create_task(self._run(client, request))
        tasks.add(self._task)
        self._task.add_done_callback(tasks.discard)
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():  # perhaps before it began
            self._queue.put(UpstreamError("The call was ended.", code="upstream_lost"))

    async def _run(self, client: Any, request: Any) -> None:
        """Make the request and hand over what comes."""
        where = f"{request.url.scheme}://{request.url.netloc.decode()}"
        try:
            response = await client.send(request, stream=True)
            try:
                headers = {name.lower(): value for name, value in response.headers.items()}
                self._queue.put(Head(response.status_code, headers))
                async for piece in response.aiter_raw():
                    await self._room.acquire()
                    self._queue.put(piece)
            finally:
                await response.aclose()
            self._queue.put(END)
        except Exception as error:  # noqa: BLE001  whatever it is, whoever waits has to be told
            self._queue.put(_translated(error, where))


class Transport:
    """Thread-safe. Its thread starts with the first request."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._client: Any = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def open(
        self, method: str, url: str, *, headers: Mapping[str, str], body: bytes | None, timeouts: Timeouts
    ) -> Exchange:
        """Begin a request. No header goes along but these, and those that HTTP needs. Redirects are not followed.

        Raises:
            UpstreamError: the transport is closed.
        """
        with self._lock:
            loop = self._started()
            exchange = Exchange(loop)
            limits = httpx.Timeout(timeouts.read_s, connect=timeouts.connect_s)
            request = self._client.build_request(method, url, headers=headers, content=body, timeout=limits)
            loop.call_soon_threadsafe(exchange.begin, self._client, request, self._tasks)
        return exchange

    def _started(self) -> asyncio.AbstractEventLoop:
        if self._closed:
            raise UpstreamError("The server is shutting down.", code="upstream_unavailable")
        if self._loop is None:
            self._client = httpx.AsyncClient(
                follow_redirects=False,
                trust_env=False,  # no proxy, no credentials of a netrc file
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=KEPT_CONNECTIONS),
                headers={"Accept-Encoding": "identity", "User-Agent": "vramancer"},
            )
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._run, args=(self._loop,), name="vrm-upstreams", daemon=True)
            self._thread.start()
        return self._loop

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
        finally:
            loop.run_until_complete(self._end())
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    async def _end(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:  # not those below them, which the library ends itself
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()
        await asyncio.sleep(0)  # in which connections that were closed end

    def close(self) -> None:
        """End every call. Safe to call twice."""
        with self._lock:
            self._closed = True
            loop, thread = self._loop, self._thread
            self._loop = None
            if loop is None or thread is None:
                return
            loop.call_soon_threadsafe(loop.stop)
        thread.join()


def _translated(error: Exception, where: str) -> VRAMancerError:
    """What went wrong, without what was sent."""
    kind = type(error).__name__
    if isinstance(error, httpx.ConnectTimeout):
        return UpstreamTimeoutError(f"{where} does not take a connection in time.", code="upstream_unreachable")
    if isinstance(error, httpx.TimeoutException):
        return UpstreamTimeoutError(f"{where} was silent for too long.")
    if isinstance(error, httpx.ConnectError):
        return UpstreamError(f"{where} cannot be reached: {error}.", code="upstream_unreachable")
    if isinstance(error, httpx.TransportError):
        return UpstreamError(f"{where} broke its answer off ({kind}).", code="upstream_lost")
    log.error("call to another server failed unexpectedly", where=where, error=repr(error))
    return UpstreamError(f"The call to {where} failed ({kind}).", code="upstream_failed")
