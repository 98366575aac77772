"""How likely a block is to be used again: hybrid LRU/LFU hotness with exponential decay. Pure; times are arguments.

A block used at times `t_i` has, with half-life `h`::

    frequency(t) = sum_i 2^(-(t - t_i)/h)       LFU that forgets
    recency(t)   = 2^(-(t - t_last)/h)          LRU, 1 at the moment of use
    score(t)     = w * frequency(t) + (1 - w) * recency(t)

(the spectrum between LRU and LFU of Lee et al., "LRFU", IEEE ToC 2001). Both terms decay alike, so the order of two
blocks never changes between uses, and `order` gives it without knowing the time: queues stay sorted by themselves.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

HEAT_BOUNDS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0)
"""Scores that a spread counts blocks up to."""
_SAMPLE = 1024


@dataclass(frozen=True, slots=True)
class Heat:
    """A block's decayed number of uses at its last use, and when that was (seconds)."""

    frequency: float
    last_s: float


@dataclass(frozen=True, slots=True)
class HeatModel:
    """`half_life_s` in seconds; `frequency_weight` between 0 (LRU) and 1 (LFU)."""

    half_life_s: float = 600.0
    frequency_weight: float = 0.5

    def used(self, heat: Heat | None, now_s: float) -> Heat:
        """The heat after a use at `now_s`; None is a block never seen before."""
        if heat is None:
            return Heat(1.0, now_s)
        now_s = max(now_s, heat.last_s)
        return Heat(heat.frequency * self._decay(now_s - heat.last_s) + 1.0, now_s)

    def score(self, heat: Heat, now_s: float) -> float:
        """Hotness at `now_s`: 1 for a block used once just now, half of that a half-life later."""
        return self._weighted(heat) * self._decay(now_s - heat.last_s)

    def order(self, heat: Heat) -> float:
        """A number that sorts blocks by hotness at any time: `log2(score(t)) + t/h`, which does not depend on `t`."""
        return math.log2(self._weighted(heat)) + heat.last_s / self.half_life_s

    def _weighted(self, heat: Heat) -> float:
        return self.frequency_weight * heat.frequency + 1.0 - self.frequency_weight

    def _decay(self, elapsed_s: float) -> float:
        return 2.0 ** (-max(0.0, elapsed_s) / self.half_life_s) if elapsed_s < 1000 * self.half_life_s else 0.0


@dataclass(frozen=True, slots=True)
class HeatSpread:
    """How hot `count` blocks are: how many are at or below each of `HEAT_BOUNDS`, and the mean (0 without blocks)."""

    count: int = 0
    below: tuple[int, ...] = (0,) * len(HEAT_BOUNDS)
    mean: float = 0.0


class HeatTable:
    """Heat by hash, also of blocks that no tier holds, so that one that comes back is known. Of those, the last used
    `max_absent` are remembered."""

    def __init__(self, model: HeatModel, max_absent: int = 1 << 14) -> None:
        self.model = model
        self._max_absent = max_absent
        self._heat: dict[bytes, Heat] = {}
        self._holders: dict[bytes, int] = {}
        self._absent: OrderedDict[bytes, None] = OrderedDict()  # known and not held, last used last

    def use(self, block: bytes, now_s: float) -> None:
        """Count a use."""
        self._heat[block] = self.model.used(self._heat.get(block), now_s)
        self._remember(block)

    def meet(self, block: bytes, now_s: float) -> None:
        """Know a block from now on; one already known is left as it is."""
        if block not in self._heat:
            self.use(block, now_s)

    def hold(self, block: bytes) -> None:
        """A tier has a block, which is known: it is not forgotten while one does."""
        self._holders[block] = self._holders.get(block, 0) + 1
        self._absent.pop(block, None)

    def let_go(self, block: bytes) -> None:
        """Undo one `hold`."""
        self._holders[block] -= 1
        if not self._holders[block]:
            del self._holders[block]
            self._remember(block)

    def _remember(self, block: bytes) -> None:
        if block in self._holders:
            return
        self._absent[block] = None
        self._absent.move_to_end(block)
        if len(self._absent) > self._max_absent:
            del self._heat[self._absent.popitem(last=False)[0]]

    def score(self, block: bytes, now_s: float) -> float:
        heat = self._heat.get(block)
        return 0.0 if heat is None else self.model.score(heat, now_s)

    def order(self, block: bytes) -> float:
        return self.model.order(self._heat[block])

    def spread(self, blocks: Sequence[bytes], now_s: float) -> HeatSpread:
        """How hot these blocks are; of many, an evenly spaced sample is looked at and stands for the others."""
        step = len(blocks) // _SAMPLE + 1
        scores = [self.score(block, now_s) for block in blocks[::step]]
        weight = len(blocks) / len(scores) if scores else 0.0
        counts = [0] * len(HEAT_BOUNDS)
        for score in scores:
            place = bisect_left(HEAT_BOUNDS, score)
            if place < len(counts):
                counts[place] += 1
        below = tuple(round(weight * total) for total in accumulate(counts))
        return HeatSpread(len(blocks), below, sum(scores) / len(scores) if scores else 0.0)
