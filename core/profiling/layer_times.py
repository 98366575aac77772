"""What decoder layers take beside reading weights and multiplying matrices, and while others compute too."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import fmean, median

import torch

from core.profiling.random_layers import RandomLayers

OVERHEAD_ROWS = (1, 8, 32)
"""Tokens of the steps that are timed: the first is what one stream pays, the others what more of them add."""

SHARING_ROWS = (1, 32)
"""Tokens of the steps that are timed side by side: few, whose time is reading, and many, whose time is computing."""

_TURNS = 4


def split_overheads(rows: Sequence[int], beyond_s: Sequence[float]) -> tuple[float, float]:
    """Seconds that each layer, and a layer for each token, takes beyond the roofline: from what a layer takes beyond it
    in steps of so many `rows`, the first of them 1.

    What grows with the rows is fitted by least squares through the time of one row.
    """
    further = [number - 1 for number in rows]
    grown = sum(number * (over_s - beyond_s[0]) for number, over_s in zip(further, beyond_s, strict=True))
    row_s = max(0.0, grown / sum(number * number for number in further))
    return max(0.0, beyond_s[0] - row_s), row_s


def measure_sharing(
    parts: Sequence[RandomLayers], prepare_thread: Callable[[], None], overlap: Callable[[bool], None], budget_s: float
) -> tuple[float, float]:
    """How many times longer steps of one and of many rows take each part while all of them compute, at least 1.

    Parts compute alone and together by turns, so that a machine whose speed drifts slows both alike. `prepare_thread`
    is called in every thread that computes beside others, `overlap` with whether several are about to, as when serving.
    """
    turn_s = budget_s / (len(SHARING_ROWS) * _TURNS * (len(parts) + 1))
    with ThreadPoolExecutor(len(parts), "sharing", prepare_thread) as pool:
        reading, computing = (_slowdown(parts, rows, pool, overlap, turn_s) for rows in SHARING_ROWS)
    return reading, computing


def _slowdown(
    parts: Sequence[RandomLayers], rows: int, pool: ThreadPoolExecutor, overlap: Callable[[bool], None], turn_s: float
) -> float:
    alone: list[list[float]] = [[] for _ in parts]
    together: list[list[float]] = [[] for _ in parts]
    for part in parts:
        part.set_step(rows, part.short)
        _time_steps(part, 0.0)
    for _ in range(_TURNS):
        overlap(False)
        for part, times_s in zip(parts, alone, strict=True):
            times_s += _time_steps(part, turn_s)
        overlap(True)
        begin = threading.Barrier(len(parts))
        running = [pool.submit(_time_steps, part, turn_s, begin) for part in parts]
        for future, times_s in zip(running, together, strict=True):
            times_s += future.result()
    overlap(False)
    return max(1.0, fmean(median(both) / median(one) for one, both in zip(alone, together, strict=True)))


def _time_steps(part: RandomLayers, seconds: float, begin: threading.Barrier | None = None) -> list[float]:
    """Seconds of each of the steps that begin within `seconds`, at least one."""
    times_s: list[float] = []
    with torch.inference_mode():
        if begin is not None:
            begin.wait()
        until_s = time.perf_counter() + seconds
        while not times_s or time.perf_counter() < until_s:
            started_s = time.perf_counter()
            part.step()
            times_s.append(time.perf_counter() - started_s)
    return times_s
