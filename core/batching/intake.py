"""How other threads reach the engine thread: requests, aborts and calls, in one queue. And when requests are refused.

An intake is open from the start. It stays open while the engine is parked: what arrives waits. It is closed once, when
the engine ends or another one takes its requests over.

What it holds is bounded, in sequences and in the tokens of their prompts: a request counts from when it is submitted
until it is over.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeVar

from core.batching.output import RequestHandle, Sink
from core.batching.sequence import Request
from core.errors import (
    CircuitOpenError,
    ConflictError,
    InvalidRequestError,
    QueueFullError,
    UnavailableError,
    VRAMancerError,
)

T = TypeVar("T")
BreakerState = Literal["closed", "open", "half_open"]
CALL_S = 30.0
"""How long a caller waits for its turn between two steps."""
RELEASES_S = 60.0
"""What ended so long ago says how soon there will be room."""
MAX_RETRY_AFTER_S = 60.0


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


class Load(NamedTuple):
    """What requests hold of a queue: sequences, and the tokens of their prompts, once for each sequence."""

    sequences: int = 0
    tokens: int = 0

    def plus(self, other: Load, sign: int = 1) -> Load:
        return Load(self.sequences + sign * other.sequences, self.tokens + sign * other.tokens)

    def exceeds(self, limit: Load) -> bool:
        return self.sequences > limit.sequences or self.tokens > limit.tokens

    @classmethod
    def of(cls, requests: Iterable[Request]) -> Load:
        each = [(len(request.sequences), len(request.prompt_token_ids)) for request in requests]
        return cls(sum(count for count, _ in each), sum(count * tokens for count, tokens in each))


class Intake:
    """Thread-safe. `capacity` is how much of unfinished requests there may be at a time; `room` says in words how many
    sequences that are."""

    def __init__(self, capacity: Load, room: str) -> None:
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.capacity = capacity
        self._room = room
        self._lock = threading.Lock()
        self._held: dict[str, tuple[Request, Load]] = {}
        self._load = Load()
        self._released: deque[tuple[float, Load]] = deque()
        self._arrivals = 0
        self._closed: VRAMancerError | None = None

    @property
    def num_unfinished(self) -> int:
        """Requests submitted and not finished."""
        return len(self._held)

    @property
    def load(self) -> Load:
        """What unfinished requests hold."""
        return self._load

    def oldest(self, most: int) -> list[Request]:
        """Unfinished requests in the order of their arrival, `most` of them at most. They go on meanwhile."""
        with self._lock:
            return [request for request, _ in islice(self._held.values(), most)]

    @property
    def is_closed(self) -> bool:
        return self._closed is not None

    def matching(self, request_id: str) -> list[str]:
        """Unfinished requests with this id, or submitted together under it."""
        with self._lock:
            if request_id in self._held:
                return [request_id]
            return [name for name in self._held if name.rpartition("-")[0] == request_id]

    def check_size(self, load: Load) -> None:
        """Raise `InvalidRequestError` for what would not fit into an empty queue."""
        most = self.capacity
        if load.sequences > most.sequences:
            raise InvalidRequestError(
                f"The request makes {load.sequences} sequences (prompts times n or best_of), and this server takes "
                f"{most.sequences} at a time.",
                param="n",
            )
        if load.tokens > most.tokens:
            raise InvalidRequestError(
                f"The request's sequences have {load.tokens} prompt tokens together (n and best_of count), and this "
                f"server takes {most.tokens} at a time.",
                param="prompt",
            )

    def submit(self, requests: list[Request], retry_after_s: float, sink: Sink | None = None) -> list[RequestHandle]:
        """Queue requests, all or none. `retry_after_s` is for clients that find no room where nothing has ended lately.

        Raises `InvalidRequestError` for what never fits, `QueueFullError` for what does not now, `ConflictError`, or
        what the intake was closed with.
        """
        new = Load.of(requests)
        self.check_size(new)
        with self._lock:
            if self._closed is not None:
                raise self._closed
            if self._load.plus(new).exceeds(self.capacity):
                raise self._full(new, retry_after_s)
            taken = self._held.keys() & {request.request_id for request in requests}
            if taken:
                raise ConflictError(f"A request with id {min(taken)} is running already.")
            handles = []
            for index, request in enumerate(requests):
                request.submitted_s = time.monotonic()
                self._number(request)
                handles.append(RequestHandle(request.request_id, request.params, self.abort, sink, index))
                self.inbox.put((request, handles[-1]))
        return handles

    def _full(self, new: Load, retry_after_s: float) -> QueueFullError:
        held, most = self._load, self.capacity
        if held.sequences + new.sequences > most.sequences:
            said = f"{held.sequences} sequences are running or waiting, and {self._room}"
        else:
            said = f"Prompts of {held.tokens} tokens are running or waiting, and the queue takes {most.tokens}"
        lacking = held.plus(new).plus(most, -1)
        return QueueFullError(f"{said}; try again later.", retry_after_s=self._wait_s(lacking) or retry_after_s)

    def _wait_s(self, lacking: Load) -> float | None:
        """Seconds until so much will have ended, at the rate of late; None if nothing has."""
        now_s = time.monotonic()
        while self._released and self._released[0][0] < now_s - RELEASES_S:
            self._released.popleft()
        if len(self._released) < 2:
            return None
        span_s = now_s - self._released[0][0]
        ended = Load(*map(sum, zip(*(load for _, load in self._released), strict=True)))
        waits = [lack * span_s / max(1, done) for lack, done in zip(lacking, ended, strict=True) if lack > 0]
        return min(MAX_RETRY_AFTER_S, max(1.0, *waits))

    def _number(self, request: Request) -> None:
        load = Load.of([request])
        self._held[request.request_id] = request, load
        self._load = self._load.plus(load)
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
            _, load = self._held.pop(request_id, (None, None))
            if load is not None:
                self._load = self._load.plus(load, -1)
                self._released.append((time.monotonic(), load))
                if len(self._released) > self.capacity.sequences:
                    self._released.popleft()

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


# -- refusing ----------------------------------------------------------------------------------------------------------


class CircuitBreaker:
    """After several failed steps in a row, refuses requests for a while instead of failing each of them.

    Closed until `failures` steps in a row have failed; then open for `reset_s` seconds; then half-open: requests are
    let in again, and the next step decides. Thread-safe. `clock` gives seconds.
    """

    def __init__(self, failures: int, reset_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._threshold = failures
        self._reset_s = reset_s
        self._clock = clock
        self._lock = threading.Lock()
        self._count = 0
        self._opened_s: float | None = None
        self.last_error: str | None = None

    @property
    def state(self) -> BreakerState:
        with self._lock:
            return self._state()

    def _state(self) -> BreakerState:
        if self._opened_s is None:
            return "closed"
        return "half_open" if self._clock() - self._opened_s >= self._reset_s else "open"

    @property
    def consecutive_failures(self) -> int:
        return self._count

    def check(self) -> None:
        """Raise `CircuitOpenError`, with the seconds left, while the breaker is open."""
        with self._lock:
            if self._state() == "open" and self._opened_s is not None:
                left = self._reset_s - (self._clock() - self._opened_s)
                raise CircuitOpenError(
                    f"{self._count} steps in a row have failed (last: {self.last_error}); refusing requests for "
                    f"{left:.0f} s.",
                    retry_after_s=max(1.0, left),
                )

    def record_failure(self, error: str) -> None:
        with self._lock:
            self._count += 1
            self.last_error = error
            if self._count >= self._threshold:
                self._opened_s = self._clock()

    def record_success(self) -> None:
        with self._lock:
            self._count = 0
            self._opened_s = None
