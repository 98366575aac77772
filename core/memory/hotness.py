"""How likely a block is to be used again: hybrid LRU/LFU hotness with exponential decay. Pure; times are arguments.

A block used at times `t_i` has, with half-life `h`::

    frequency(t) = sum_i 2^(-(t - t_i)/h)       LFU that forgets
    recency(t)   = 2^(-(t - t_last)/h)          LRU, 1 at the moment of use
    score(t)     = w * frequency(t) + (1 - w) * recency(t)

(the spectrum between LRU and LFU of Lee et al., "LRFU", IEEE ToC 2001). Both terms decay alike, so the order of two
blocks never changes between uses, and `order` gives it without knowing the time: queues stay sorted by themselves.

A block used at random with rate `r` has `E[frequency] = r*h/ln 2`, so `score * ln 2` uses are expected in the next
half-life, and at least one with probability `1 - exp(-score * ln 2) = 1 - 2^(-score)`.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from dataclasses import dataclass


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


def reuse_probability(score: float) -> float:
    """Probability of at least one use in the next half-life."""
    return -math.expm1(-score * math.log(2))


def keep_value(score: float, recompute_s: float, fetch_s: float, nbytes: int) -> float:
    """Seconds saved per byte by keeping a block: `p_reuse * (t_recompute - t_fetch) / bytes`; not above 0 means that
    recomputing is no slower than fetching."""
    return reuse_probability(score) * (recompute_s - fetch_s) / nbytes


class HeatTable:
    """Heat by hash, also of blocks that no tier holds, so that one that comes back is known. Those are bounded."""

    def __init__(self, model: HeatModel, max_absent: int = 1 << 14) -> None:
        self.model = model
        self._max_absent = max_absent
        self._heat: dict[bytes, Heat] = {}
        self._trim_at = max_absent

    def __len__(self) -> int:
        return len(self._heat)

    def use(self, block: bytes, now_s: float) -> None:
        """Count a use."""
        self._heat[block] = self.model.used(self._heat.get(block), now_s)

    def meet(self, block: bytes, now_s: float) -> None:
        """Know a block from now on; one already known is left as it is."""
        if block not in self._heat:
            self._heat[block] = Heat(1.0, now_s)

    def score(self, block: bytes, now_s: float) -> float:
        heat = self._heat.get(block)
        return 0.0 if heat is None else self.model.score(heat, now_s)

    def order(self, block: bytes) -> float:
        return self.model.order(self._heat[block])

    def mean_score(self, blocks: Iterable[bytes], now_s: float) -> float:
        """Mean hotness, 0 for no blocks."""
        scores = [self.score(block, now_s) for block in blocks]
        return sum(scores) / len(scores) if scores else 0.0

    def trim(self, held: Container[bytes]) -> None:
        """Forget the coldest blocks that are not `held` once there are too many. Cheap when there are not."""
        if len(self._heat) <= self._trim_at:
            return
        absent = sorted((block for block in self._heat if block not in held), key=self.order)
        for block in absent[: max(0, len(absent) - self._max_absent // 2)]:
            del self._heat[block]
        self._trim_at = len(self._heat) + self._max_absent // 2
