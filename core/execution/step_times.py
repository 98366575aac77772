"""How long a stage computed in each of the last steps, where somebody wants to know."""

from __future__ import annotations

import threading

KEPT_STEPS = 256
"""More than may be in flight; steps that failed are never asked for."""


class StepTimes:
    """Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[int, float] = {}

    def add(self, step: int, seconds: float) -> None:
        """A step took so long."""
        with self._lock:
            self._seconds[step] = seconds
            if len(self._seconds) > KEPT_STEPS:
                del self._seconds[next(iter(self._seconds))]

    def take(self, step: int) -> float:
        """How long it took, once; 0 if that is not known."""
        with self._lock:
            return self._seconds.pop(step, 0.0)
