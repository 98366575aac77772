"""`DemandWatch`: how many blocks to borrow before the pool is dry, and how many to give back. Pure.

One mark says how many blocks should have memory behind them::

    mark = in use + waiting + max(0, rate) * horizon + one extent

    backed < mark                             borrow, in whole extents
    backed > mark + one extent, and so it     give back what is beyond, in whole extents
    was at every moment of the hold time

`rate` is an exponentially weighted mean of growth (blocks/s); the `horizon` is how long a grant takes, as measured,
plus a margin. What keeps it from flapping: borrowing and giving back are an extent apart; blocks go back only if the
highest mark of the whole hold time could do without them, and they were there all that time; and nothing goes back
while the use of blocks grows.
"""

from __future__ import annotations

import math
from collections import deque

LEAD_FACTOR = 1.5
"""A grant may take this many times as long as the ones before."""
LEAD_DECAY = 0.2
"""Share of a faster grant in the lead time; a slower one counts in full at once."""


class _WindowMax:
    """The largest value of a step function within the last `window_s`; each value lasts until the next."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._past: deque[tuple[float, float]] = deque()  # (lasted until, value): times ascend, values descend
        self._now: float | None = None

    def add(self, now_s: float, value: float) -> None:
        if self._now is not None:
            while self._past and self._past[-1][1] <= self._now:
                self._past.pop()
            self._past.append((now_s, self._now))
        self._now = value
        while self._past and self._past[0][0] <= now_s - self._window_s:
            self._past.popleft()

    @property
    def value(self) -> float:
        now = self._now or 0.0
        return max(self._past[0][1], now) if self._past else now


class DemandWatch:
    """Watches one borrower's blocks. Times are in seconds on any clock that does not go back. `rate_blocks_s` is the
    growth of the blocks in use, negative while they become fewer.

    Args:
        extent_blocks: blocks are borrowed and given back in multiples of this.
        hold_s: how long blocks must have been unused to be given back. It should exceed the period of load that comes
            and goes.
        rate_window_s: time constant of the rate's mean: growth that long ago counts 1/e.
        lead_s: how long a grant takes, until one has been measured (`granted`).
        margin_s: added to the lead time; at least a step, for decisions are made between steps.

    Raises `ValueError` for no extent, a time that is negative, or a `hold_s` or `rate_window_s` of 0.
    """

    def __init__(
        self,
        extent_blocks: int,
        *,
        hold_s: float = 10.0,
        rate_window_s: float = 0.5,
        lead_s: float = 0.05,
        margin_s: float = 0.25,
    ) -> None:
        if extent_blocks < 1 or min(hold_s, rate_window_s) <= 0 or min(lead_s, margin_s) < 0:
            raise ValueError(
                f"extent_blocks {extent_blocks}, hold_s {hold_s}, rate_window_s {rate_window_s}, lead_s {lead_s}, "
                f"margin_s {margin_s}"
            )
        self._extent = extent_blocks
        self._hold_s = hold_s
        self._window_s = rate_window_s
        self._lead_s = lead_s
        self._margin_s = margin_s
        self.rate_blocks_s = 0.0
        self._now_s: float | None = None
        self._since_s = 0.0
        self._used = self._backed = 0
        self._mark = 0.0
        self._highest_mark = _WindowMax(hold_s)
        self._least_backed = _WindowMax(hold_s)  # of negative values

    @property
    def horizon_s(self) -> float:
        """How far ahead it looks: `LEAD_FACTOR` lead times and the margin."""
        return LEAD_FACTOR * self._lead_s + self._margin_s

    def granted(self, lead_s: float) -> None:
        """A grant took `lead_s` from the decision until its blocks could be used."""
        self._lead_s = max(lead_s, self._lead_s + LEAD_DECAY * (lead_s - self._lead_s))

    def observe(self, now_s: float, blocks_in_use: int, blocks_backed: int, waiting_blocks: int = 0) -> None:
        """Once per step. Raises `ValueError` if time went back.

        Args:
            now_s: when.
            blocks_in_use: with ref-count 1 or more; free ones with cached content are not in use.
            blocks_backed: that have memory behind them, own or borrowed, or have been asked for and are on their way.
            waiting_blocks: certain to be taken as soon as they are free, by requests at the head of the queue. Where
                they wait for memory, nothing grows, and the rate says nothing.
        """
        if self._now_s is None:
            self._now_s = self._since_s = now_s
            self._used = blocks_in_use
        passed_s = now_s - self._now_s
        if passed_s < 0:
            raise ValueError(f"time went back by {-passed_s} s")
        # weight (1 - exp(-dt/w)) of the growth rate delta/dt; as dt goes to 0 this becomes delta/w
        fade = math.exp(-passed_s / self._window_s)
        weight = (1 - fade) / passed_s if passed_s > 0 else 1 / self._window_s
        self.rate_blocks_s = fade * self.rate_blocks_s + weight * (blocks_in_use - self._used)
        self._now_s, self._used, self._backed = now_s, blocks_in_use, blocks_backed
        self._mark = blocks_in_use + waiting_blocks + max(0.0, self.rate_blocks_s) * self.horizon_s + self._extent
        self._highest_mark.add(now_s, self._mark)
        self._least_backed.add(now_s, -blocks_backed)

    def blocks_to_borrow(self) -> int:
        """How many blocks to ask for now, a multiple of the extent; 0 while there are enough for the horizon."""
        return self._extent * max(0, math.ceil((self._mark - self._backed) / self._extent))

    def blocks_to_return(self, borrowed_blocks: int) -> int:
        """How many of the blocks that are borrowed to give back now: a multiple of the extent, or all of them.

        0 until a whole hold time was observed, and while the use of blocks grows by a block per hold time or more.
        """
        if self._now_s is None or self._now_s - self._since_s < self._hold_s or self.rate_blocks_s * self._hold_s >= 1:
            return 0
        unused = math.floor(-self._least_backed.value - self._highest_mark.value) - self._extent
        if unused >= borrowed_blocks:
            return borrowed_blocks
        return max(0, unused) // self._extent * self._extent
