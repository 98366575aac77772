"""Percentiles of what happened lately, for people who look now; Prometheus has histograms."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LATELY_S = 300.0
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of `count` durations, in seconds; None where there is none."""

    count: int
    p50: float | None
    p95: float | None
    p99: float | None


def percentiles(values: Sequence[float]) -> dict[int, float]:
    """The nearest-rank `PERCENTILES` of values in any order; empty without values."""
    ordered = sorted(values)
    return {p: ordered[max(0, -(-p * len(ordered) // 100) - 1)] for p in PERCENTILES} if ordered else {}


class Window:
    """The last `size` durations, with the time of each. One thread adds, any thread reads."""

    def __init__(self, size: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._at_s = array("d", bytes(8 * size)), array("d", bytes(8 * size))
        self._size = size
        self._added = 0
        self._clock = clock

    def add(self, seconds: float) -> None:
        slot = self._added % self._size
        self._seconds[slot], self._at_s[slot] = seconds, self._clock()
        self._added += 1

    def values(self) -> list[float]:
        """What came in the last `LATELY_S` seconds, as far as it is kept; in no order."""
        kept = min(self._added, self._size)
        since_s = self._clock() - LATELY_S
        seconds, at_s = self._seconds[:kept], self._at_s[:kept]
        return [value for value, when in zip(seconds, at_s, strict=True) if when >= since_s]

    def percentiles(self) -> Percentiles:
        """Of `values`."""
        values = self.values()
        found = percentiles(values)
        return Percentiles(len(values), found.get(50), found.get(95), found.get(99))
