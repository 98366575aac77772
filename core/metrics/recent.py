"""Percentiles, for people who look now; Prometheus has histograms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of `count` durations, in seconds; None where there is none."""

    count: int
    p50: float | None
    p95: float | None
    p99: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles:
        found = percentiles(values)
        return cls(len(values), found.get(50), found.get(95), found.get(99))


def percentiles(values: Sequence[float]) -> dict[int, float]:
    """The nearest-rank `PERCENTILES` of values in any order; empty without values."""
    ordered = sorted(values)
    return {p: ordered[max(0, -(-p * len(ordered) // 100) - 1)] for p in PERCENTILES} if ordered else {}
