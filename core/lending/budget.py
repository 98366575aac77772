"""`GPUBudget`: how a device's memory is used, and how much of it may be lent. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GPUBudget:
    """The memory of one lender at one moment, in bytes.

    ::

        |<------------------------------- total ------------------------------->|
        |<---------------------------- limit --------------------------->| margin
        |  own: weights, KV, workspace  |  lent  |   free   |  external  |

    Attributes:
        name: of the logical device.
        limit_bytes: what may be allocated on it.
        total_bytes: what the lend ratio and the utilisation are shares of: the card's memory, or the part's where a
            card is carved up; at least `limit_bytes`.
        own_bytes: its own weights, KV pages and workspace, without what it lent.
        external_bytes: what other programs took of the card beyond what the limit already leaves to them.
        lent_bytes: sum of its leases.
        idle_s: since the device last computed.
        last_resort: main memory: lends only when no GPU has room, and all of its limit rather than the lend ratio.
    """

    name: str
    limit_bytes: int
    total_bytes: int
    own_bytes: int = 0
    external_bytes: int = 0
    lent_bytes: int = 0
    idle_s: float = 0.0
    last_resort: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.limit_bytes <= self.total_bytes or self.total_bytes == 0:
            raise ValueError(f"{self.name}: a limit of {self.limit_bytes} bytes of {self.total_bytes}")
        if min(self.own_bytes, self.external_bytes, self.lent_bytes) < 0:
            raise ValueError(f"{self.name}: negative bytes in {self}")
        if not (math.isfinite(self.idle_s) and self.idle_s >= 0):
            raise ValueError(f"{self.name}: idle for {self.idle_s} s")

    def lendable_bytes(self, lend_ratio: float) -> int:
        """What it may still lend: within `lend_ratio` (0 to 1) of the total and within the limit; never negative."""
        allowed = self.total_bytes if self.last_resort else int(lend_ratio * self.total_bytes)
        free = self.limit_bytes - self.own_bytes - self.external_bytes - self.lent_bytes
        return max(0, min(allowed - self.lent_bytes, free))

    @property
    def utilisation(self) -> float:
        """Share of the total that the device needs itself, or that is taken from it. `VRM_RECLAIM_THRESHOLD` is
        compared with this.

        Leases do not count: what was lent is given back on demand, so it is no need of the lender's. (If they did,
        lending by itself could reach the threshold, and lender and borrower would pass the same bytes to and fro.)
        """
        return (self.own_bytes + self.external_bytes) / self.total_bytes

    @property
    def shortfall_bytes(self) -> int:
        """By how much everything together exceeds the limit."""
        return max(0, self.own_bytes + self.external_bytes + self.lent_bytes - self.limit_bytes)
