"""What changes from look to look: tokens a second, how busy the stages were."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

from vramancer.cli.live.answers import Stage
from vramancer.cli.live.look import Look

LATELY_S = 5.0
"""Rates are over so many seconds, or from one look to the next if these are further apart."""
KEPT_S = 600.0
"""Tokens are remembered for so long."""

Point = tuple[float, float]
"""A time, and tokens that had been made by then."""


@dataclass(frozen=True, slots=True)
class Lately:
    """The last seconds. `busy` and `predicted` are shares of the time by stage, the latter what the cost model expected
    of the same steps; nothing is known before the second look. `points` go back to the first look, or `KEPT_S`."""

    tokens_per_second: float | None = None
    busy: Mapping[int, float] | None = None
    predicted: Mapping[int, float] | None = None
    points: Sequence[Point] = ()


class Trend:
    """Remembers looks; a server that has started again begins anew, and so do stages that have moved."""

    def __init__(self) -> None:
        self._points: deque[Point] = deque()
        self._generated = 0
        self._stages: deque[tuple[float, tuple[Stage, ...]]] = deque()

    def add(self, look: Look) -> Lately:
        """After a further look."""
        self._add_tokens(look)
        stages = look.pipeline.stages
        if self._stages and not _goes_on(self._stages[-1][1], stages):
            self._stages.clear()
        self._stages.append((look.at_s, stages))
        while len(self._stages) > 2 and self._stages[1][0] <= look.at_s - LATELY_S:
            self._stages.popleft()
        points = tuple(self._points)
        busy, predicted = self._shares()
        return Lately(_rate(points), busy, predicted, points)

    def _add_tokens(self, look: Look) -> None:
        now = look.batcher.generated_tokens
        made = 0 if not self._points else now - self._generated if now >= self._generated else now
        self._generated = now
        before = self._points[-1][1] if self._points else 0.0
        self._points.append((look.at_s, before + made))
        while len(self._points) > 2 and self._points[1][0] <= look.at_s - KEPT_S:
            self._points.popleft()

    def _shares(self) -> tuple[dict[int, float] | None, dict[int, float] | None]:
        (then_s, then), (now_s, now) = self._stages[0], self._stages[-1]
        if now_s <= then_s:
            return None, None
        pairs, seconds = list(zip(then, now, strict=True)), now_s - then_s
        busy = {new.index: min(1.0, (new.busy_seconds - old.busy_seconds) / seconds) for old, new in pairs}
        predicted = {
            new.index: (new.predicted_seconds - old.predicted_seconds) / seconds
            for old, new in pairs
            if new.predicted_seconds is not None and old.predicted_seconds is not None
        }
        return busy, predicted


def _goes_on(before: Sequence[Stage], after: Sequence[Stage]) -> bool:
    """Whether these are the same stages, some time later."""
    return len(before) == len(after) and all(
        (old.index, old.device, old.layers) == (new.index, new.device, new.layers)
        and old.busy_seconds <= new.busy_seconds
        for old, new in zip(before, after, strict=True)
    )


def _rate(points: Sequence[Point]) -> float | None:
    """Of the last seconds."""
    now_s, made = points[-1]
    then = max(0, min(len(points) - 2, bisect_right(points, now_s - LATELY_S, key=itemgetter(0)) - 1))
    then_s, made_then = points[then]
    return (made - made_then) / (now_s - then_s) if now_s > then_s else None


def rates(points: Sequence[Point], cells: int, cell_s: float) -> list[float | None]:
    """Tokens a second in each of the last `cells` times `cell_s`, the last of which goes on; None before the first
    point. A cell keeps its place while time passes."""
    if not points:
        return [None] * cells
    first_s, last_s = points[0][0], points[-1][0]
    last = int(last_s // cell_s)
    found: list[float | None] = []
    for cell in range(last - cells + 1, last + 1):
        start_s, end_s = max(first_s, cell * cell_s), min(last_s, (cell + 1) * cell_s)
        known = end_s > start_s
        found.append((_made(points, end_s) - _made(points, start_s)) / (end_s - start_s) if known else None)
    return found


def _made(points: Sequence[Point], at_s: float) -> float:
    """Tokens by then, as if they had come evenly between two looks."""
    after = min(len(points) - 1, max(1, bisect_right(points, at_s, key=itemgetter(0))))
    (from_s, before), (to_s, by_then) = points[after - 1], points[after]
    return before + (by_then - before) * min(1.0, max(0.0, (at_s - from_s) / (to_s - from_s)))
