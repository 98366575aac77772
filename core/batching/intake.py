"""How other threads reach the engine thread: requests, aborts and calls, in one queue.

An intake is open from the start. It stays open while the engine is parked: what arrives waits. It is closed once, when
the engine ends or another one takes its requests over.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any, TypeVar

from core.batching.output import RequestHandle, Sink
from core.batching.sequence import Request
from core.errors import ConflictError, QueueFullError, UnavailableError, VRAMancerError

T = TypeVar("T")
CALL_S = 30.0
"""How long a caller waits for its turn between two steps."""


@dataclass(slots=True)
class Call:
    """Work for the engine thread between two steps."""

    function: Callable[[], Any]
    future: Future[Any]

    def run(self) -> None:
        """Here and now, unless whoever waits has given up."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.function())
        except Exception as error:  # noqa: BLE001  handed to the caller, who waits on the future
            self.future.set_exception(error)

    def refuse(self, error: Exception) -> None:
        """It will never run."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


@dataclass(slots=True)
class Abort:
    """A client no longer wants its answer."""

    request_id: str


class Intake:
    """Thread-safe. `capacity` requests may be unfinished at the same time; `room` says so in words."""

    def __init__(self, capacity: int, room: str) -> None:
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._capacity = capacity
        self._room = room
        self._lock = threading.Lock()
        self._ids: set[str] = set()
        self._arrivals = 0
        self._closed: VRAMancerError | None = None

    @property
    def num_unfinished(self) -> int:
        """Requests submitted and not finished."""
        return len(self._ids)

    @property
    def is_closed(self) -> bool:
        return self._closed is not None

    def matching(self, request_id: str) -> list[str]:
        """Unfinished requests with this id, or submitted together under it."""
        with self._lock:
            if request_id in self._ids:
                return [request_id]
            return [name for name in self._ids if name.rpartition("-")[0] == request_id]

    def submit(self, requests: list[Request], retry_after_s: float, sink: Sink | None = None) -> list[RequestHandle]:
        """Queue requests, all or none. Raises `QueueFullError`, `ConflictError`, or what the intake was closed with."""
        with self._lock:
            if self._closed is not None:
                raise self._closed
            if len(self._ids) + len(requests) > self._capacity:
                raise QueueFullError(
                    f"{len(self._ids)} requests are running or waiting, and {self._room}; try again later.",
                    retry_after_s=retry_after_s,
                )
            taken = self._ids.intersection(request.request_id for request in requests)
            if taken:
                raise ConflictError(f"A request with id {sorted(taken)[0]} is running already.")
            handles = []
            for index, request in enumerate(requests):
                request.submitted_s = time.monotonic()
                self._number(request)
                handles.append(RequestHandle(request.request_id, request.params, self.abort, sink, index))
                self.inbox.put((request, handles[-1]))
        return handles

    def _number(self, request: Request) -> None:
        self._ids.add(request.request_id)
        request.arrival = self._arrivals
        self._arrivals += 1

    def abort(self, request_id: str) -> None:
        self.inbox.put(Abort(request_id))

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function on the engine thread between two steps, when none is in flight."""
        future: Future[T] = Future()
        with self._lock:
            if self._closed is not None:
                raise self._closed
            self.inbox.put(Call(function, future))
        return future

    def call_within(self, function: Callable[[], T], timeout_s: float | None = None) -> T:
        """`call`, and wait for the result. What has not begun within `timeout_s` (None: `CALL_S`) never will: raises
        `UnavailableError`. What has is waited for."""
        future, timeout_s = self.call(function), CALL_S if timeout_s is None else timeout_s
        try:
            return future.result(timeout_s)
        except FutureTimeoutError:  # before Python 3.11 no `TimeoutError`
            if future.cancel():
                said = f"The engine has not come to it within {timeout_s:g} s, so nothing was done; try again later."
                raise UnavailableError(said, retry_after_s=timeout_s) from None
        return future.result()

    def release(self, request_id: str) -> None:
        """The request is over; its id may be used again."""
        with self._lock:
            self._ids.discard(request_id)

    def adopt(self, requests: Iterable[Request]) -> None:
        """Requests that another intake has taken in, in their order; there may be more of them than the capacity."""
        with self._lock:
            for request in requests:
                self._number(request)

    def close(self, error: VRAMancerError) -> list[Any]:
        """Refuse with `error` what comes from now on. Returns what waits."""
        with self._lock:
            self._closed = error
        waiting = []
        while True:
            try:
                waiting.append(self.inbox.get(block=False))
            except queue.Empty:
                return waiting
