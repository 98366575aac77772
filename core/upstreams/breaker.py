"""When an address is not asked for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Literal

State = Literal["closed", "open", "half_open"]


class Breaker:
    """Closed until `failures` calls in a row have failed; then open for `reset_s` seconds; then half-open: one call at
    a time is let through, and how it ends decides. Thread-safe. `clock` gives seconds.

    Unlike the engine's, which lets everything in again when it is half-open: a step fails at once, whereas a call to an
    address that does not answer holds its client until a timeout.
    """

    def __init__(self, failures: int, reset_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._threshold = failures
        self._reset_s = reset_s
        self._clock = clock
        self._lock = threading.Lock()
        self._opened_s: float | None = None
        self._trying = False
        self.failures = 0
        self.last_error: str | None = None

    @property
    def state(self) -> State:
        with self._lock:
            return self._state()

    def _state(self) -> State:
        if self._opened_s is None:
            return "closed"
        return "half_open" if self._clock() - self._opened_s >= self._reset_s else "open"

    @property
    def left_s(self) -> float:
        """Seconds until it lets a call through; 0 when it does now."""
        with self._lock:
            if self._opened_s is None:
                return 0.0
            return max(0.0, self._reset_s - (self._clock() - self._opened_s))

    def admits(self) -> bool:
        """Whether `enter` would succeed now."""
        with self._lock:
            return self._admits()

    def _admits(self) -> bool:
        state = self._state()
        return state == "closed" or (state == "half_open" and not self._trying)

    def enter(self) -> bool:
        """Let a call through, or not. One that was let through ends in `succeeded`, `failed` or `gave_up`."""
        with self._lock:
            if not self._admits():
                return False
            self._trying = self._opened_s is not None
            return True

    def succeeded(self) -> None:
        with self._lock:
            self.failures = 0
            self._opened_s, self._trying = None, False

    def failed(self, error: str) -> None:
        with self._lock:
            self.failures += 1
            self.last_error = error
            self._trying = False
            if self.failures >= self._threshold:  # also when it was half-open
                self._opened_s = self._clock()

    def gave_up(self) -> None:
        """The call ended before anything was known, such as by its client."""
        with self._lock:
            self._trying = False
