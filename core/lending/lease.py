"""Leases: memory that one device lends another, and how soon it must come back. Values and pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum


class Urgency(IntEnum):
    """How soon a lender needs its memory back. The bound is announced: what was asked for is free by then.

    ========  ==========  =====================================================================================
    urgency   `bound_s`   what it means
    ========  ==========  =====================================================================================
    LOW       30 s        the lender grows; blocks move in the shade of computation
    MEDIUM    5 s         it will soon run out
    HIGH      1 s         it is beyond its limit, in the card's safety margin
    CRITICAL  0 s         the bytes are not there: they are back before the next step computes
    ========  ==========  =====================================================================================
    """

    LOW = 0
    MEDIUM = 1
    HIGH = 2
    CRITICAL = 3

    @property
    def bound_s(self) -> float:
        """Seconds from the moment a reclaim is asked for until the memory is free."""
        return BOUND_S[self]

    @property
    def label(self) -> str:
        """As metrics and answers write it: "low"."""
        return self.name.lower()


BOUND_S = {Urgency.LOW: 30.0, Urgency.MEDIUM: 5.0, Urgency.HIGH: 1.0, Urgency.CRITICAL: 0.0}

STEP_SLACK = 2.0
"""How many times longer than expected a step may take without a bound being missed."""


def bytes_to_move(bytes_left: int, seconds_left: float, step_s: float) -> int:
    """How many bytes have to move during this step so that all have moved when `seconds_left` are over.

    The bytes are spread evenly over the steps that are sure to fit, each reckoned `STEP_SLACK` times as long as
    expected; asked again at every step, this keeps the bound as long as no step is slower than that. With less time
    left than one such step everything moves now. `seconds_left` may be negative; `step_s` is finite.

    Raises `ValueError` if `step_s` is not above 0, or `bytes_left` is negative.
    """
    if step_s <= 0 or bytes_left < 0:
        raise ValueError(f"{bytes_left} bytes in steps of {step_s} s")
    steps = max(1, int(seconds_left / (STEP_SLACK * step_s)))
    return -(-bytes_left // steps)


class LeaseState(Enum):
    """Where a lease is in its life::

        GRANTED --> ACTIVE <--> RECLAIMING --> RELEASED
           |          |
           `----------+----> RECLAIMING or RELEASED

    A reclaim may want a part of a lease only, or be called off because the need has gone: then the lease is again
    what it was before. `RELEASED` is final.
    """

    GRANTED = "granted"
    """The memory is set aside; no block lives there yet."""
    ACTIVE = "active"
    """Blocks live there, or are on their way in."""
    RECLAIMING = "reclaiming"
    """The lender wants bytes back: blocks move out, none may move in."""
    RELEASED = "released"
    """The memory is the lender's again."""


_NEXT = {
    LeaseState.GRANTED: (LeaseState.ACTIVE, LeaseState.RECLAIMING, LeaseState.RELEASED),
    LeaseState.ACTIVE: (LeaseState.RECLAIMING, LeaseState.RELEASED),
    LeaseState.RECLAIMING: (LeaseState.GRANTED, LeaseState.ACTIVE, LeaseState.RELEASED),
    LeaseState.RELEASED: (),
}


@dataclass(slots=True, eq=False)
class Lease:
    """A number of block pages in one device's memory, for the use of another. Written by the pool alone, but for
    `priority`.

    Attributes:
        lease_id: unique in a pool, ascending.
        borrower: logical device whose blocks live there.
        lender: logical device whose memory it is.
        nbytes: how much memory.
        blocks: block pages in it, at least 1.
        priority: lower is reclaimed first; the coordinator writes it, whenever it likes. Leases with nothing but
            unreferenced prefix blocks are low.
        granted_s: when, on the pool's clock.
        used: whether it has ever been activated.
        reclaim_bytes: how many bytes the lender wants back of it, 0 to `nbytes`; above 0 only while RECLAIMING.
        urgency: of the reclaim, None unless RECLAIMING.
        deadline_s: by when on the pool's clock, None unless RECLAIMING.
    """

    lease_id: int
    borrower: str
    lender: str
    nbytes: int
    blocks: int
    priority: int
    granted_s: float
    state: LeaseState = LeaseState.GRANTED
    used: bool = False
    reclaim_bytes: int = 0
    urgency: Urgency | None = None
    deadline_s: float | None = None

    def move_to(self, state: LeaseState) -> None:
        """Raises `ValueError` if a lease does not go from where it is to `state`."""
        if state not in _NEXT[self.state]:
            raise ValueError(f"lease {self.lease_id} is {self.state.value}, it cannot become {state.value}")
        self.state = state

    def ask_back(self, nbytes: int, urgency: Urgency, deadline_s: float) -> None:
        """The lender wants `nbytes` (1 to all) of it."""
        if self.state is not LeaseState.RECLAIMING:
            self.move_to(LeaseState.RECLAIMING)
        self.reclaim_bytes, self.urgency, self.deadline_s = nbytes, urgency, deadline_s

    def leave(self) -> None:
        """The lender wants nothing of it, or no longer: a lease in RECLAIMING is again what it was before."""
        if self.state is LeaseState.RECLAIMING:
            self.move_to(LeaseState.ACTIVE if self.used else LeaseState.GRANTED)
        self.reclaim_bytes, self.urgency, self.deadline_s = 0, None, None

    def check_invariants(self) -> None:
        """Raise `AssertionError` unless it is a lease that a pool may keep."""
        problems = (
            (self.state is LeaseState.RELEASED, "is released but kept"),
            (self.blocks < 1 or self.nbytes < 1, f"holds {self.blocks} blocks, {self.nbytes} bytes"),
            (self.borrower == self.lender, f"lends {self.lender} its own memory"),
            (self.state is LeaseState.ACTIVE and not self.used, "is active but was never activated"),
            (self.state is LeaseState.GRANTED and self.used, "is in use but only granted"),
            (not 0 <= self.reclaim_bytes <= self.nbytes, f"is asked for {self.reclaim_bytes} of {self.nbytes} bytes"),
            ((self.reclaim_bytes > 0) != (self.state is LeaseState.RECLAIMING), f"is {self.state.value}"),
            ((self.urgency is None) != (self.reclaim_bytes == 0), f"has urgency {self.urgency}"),
            ((self.deadline_s is None) != (self.urgency is None), f"has the deadline {self.deadline_s}"),
        )
        for wrong, text in problems:
            if wrong:
                raise AssertionError(f"lease {self.lease_id} {text} (asked back: {self.reclaim_bytes} bytes)")
