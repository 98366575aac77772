"""Circuit breaker: after several failed steps in a row, refuse requests for a while instead of failing each of them.

Closed until `failures` steps in a row have failed; then open for `reset_s` seconds; then half-open: requests are let in
again, and the next step decides.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Literal

from core.errors import CircuitOpenError

BreakerState = Literal["closed", "open", "half_open"]


class CircuitBreaker:
    """Thread-safe. `clock` gives seconds."""

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
