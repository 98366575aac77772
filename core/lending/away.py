"""What to do about blocks that live on another device: attend to them there, bring them home, or recompute them. Pure.

A stage attends to its own pages and, at the same time, has another device attend to those it lent. A step's attention
then takes::

    A(n) = max( (local + n) / own bandwidth ,  rounds + (away - n) / the lender's bandwidth )

with `n` bytes brought home, and `rounds` (for each layer, query rows there and partial results back) paid as long as
anything is away. Bringing `n` bytes home costs one transfer and is worth it for the steps that will still read them::

    transfer(n) + steps * A(n)                    least for n = 0, where both sides are even, or everything
    tokens * time per token + steps * A(away)     everything recomputed instead of carried: over slow links
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from core.costs import LinkProfile

LEAST_GAIN = 0.1
"""Blocks move if that saves a tenth of what is spent otherwise: estimates are no better than that."""
LEAST_STEP_SHARE = 0.01
"""And if it shortens the steps by a hundredth."""


class Choice(Enum):
    """What becomes of a group of blocks."""

    ATTEND = "attend"
    """They stay, and are attended to where they are."""
    FETCH = "fetch"
    """They are brought home."""
    RECOMPUTE = "recompute"
    """They are dropped, and their sequences computed again from there on."""


@dataclass(frozen=True, slots=True)
class SiteSpeeds:
    """Between a stage and a device that lends to it, as measured.

    Attributes:
        out: link from the stage's device to the lender.
        home: and back.
        own_bytes_s: at which the stage's device reads KV.
        lender_bytes_s: at which the lender does.
        layers: that attend, in the stage.
        row_bytes: of a query row in one layer; partial results have about as many.
    """

    out: LinkProfile
    home: LinkProfile
    own_bytes_s: float
    lender_bytes_s: float
    layers: int
    row_bytes: int

    def rounds_s(self, rows: int) -> float:
        """All layers' exchanges of a step, for so many query rows."""
        return self.layers * (self.out.transfer_s(rows * self.row_bytes) + self.home.transfer_s(rows * self.row_bytes))

    def attention_s(self, local_bytes: int, away_bytes: int, rows: int) -> float:
        """A step's attention."""
        own_s = local_bytes / self.own_bytes_s
        if not away_bytes:
            return own_s
        return max(own_s, self.rounds_s(rows) + away_bytes / self.lender_bytes_s)


@dataclass(frozen=True, slots=True)
class AwayGroup:
    """Blocks of one stage on one lender that running sequences read in every step.

    Attributes:
        local_bytes: of KV that these steps read at home.
        away_bytes: that they read at the lender.
        room_bytes: free at home.
        rows: sequences that have blocks there.
        steps: that will still read them, as expected.
        recompute_s: to compute what is away, and what comes behind it, again; None if that is not possible.
        step_s: what a step takes now, all in all.
    """

    local_bytes: int
    away_bytes: int
    room_bytes: int
    rows: int
    steps: float
    recompute_s: float | None = None
    step_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """`nbytes` are brought home (FETCH), or everything is recomputed; `saved_s` is what that saves all in all."""

    choice: Choice
    nbytes: int = 0
    saved_s: float = 0.0


def decide(group: AwayGroup, speeds: SiteSpeeds) -> Decision:
    """The cheapest of the three for the steps that are left."""

    def cost_s(nbytes: int) -> float:
        left = speeds.attention_s(group.local_bytes + nbytes, group.away_bytes - nbytes, group.rows)
        return group.steps * left + (speeds.home.transfer_s(nbytes) if nbytes else 0.0)

    staying_s = cost_s(0)
    best = Decision(Choice.ATTEND)
    for nbytes in {min(group.away_bytes, group.room_bytes), _even_bytes(group, speeds)} - {0}:
        saved_s = staying_s - cost_s(nbytes)
        if saved_s > best.saved_s:
            best = Decision(Choice.FETCH, nbytes, saved_s)
    if group.recompute_s is not None and group.room_bytes >= group.away_bytes:
        again_s = group.recompute_s + group.steps * speeds.attention_s(group.local_bytes + group.away_bytes, 0, 0)
        if staying_s - again_s > best.saved_s:
            best = Decision(Choice.RECOMPUTE, group.away_bytes, staying_s - again_s)
    least_s = max(LEAST_GAIN * staying_s, LEAST_STEP_SHARE * group.steps * group.step_s)
    return best if best.saved_s > least_s else Decision(Choice.ATTEND)


def _even_bytes(group: AwayGroup, speeds: SiteSpeeds) -> int:
    """How much to bring home so that both sides take the same time; 0 if the lender is not behind."""
    behind_s = (
        speeds.rounds_s(group.rows) + group.away_bytes / speeds.lender_bytes_s - group.local_bytes / speeds.own_bytes_s
    )
    nbytes = int(behind_s / (1 / speeds.own_bytes_s + 1 / speeds.lender_bytes_s))
    return max(0, min(nbytes, group.away_bytes, group.room_bytes))
