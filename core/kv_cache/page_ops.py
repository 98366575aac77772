"""What a stage does to its pages before it computes a step, and where it then finds them. No torch here.

A page is one block's K and V of all layers of one stage. It lives in a *region*: region 0 is the stage's own device,
others are memory of another device or of the host, taken on a lease. Operations are done in order. They name blocks of
main memory by their hash and the number of their slot there: every machine that has layers has its part of a block in
the slot of this number.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

LOCAL = 0
"""The region on the stage's own device."""

PageRef = tuple[int, int]
"""(region, page in it)"""


class PageCopy(msgspec.Struct, frozen=True, tag=0, array_like=True):
    """Copy a page: a block that moves, or one that is copied before it is written."""

    source: PageRef
    target: PageRef


class PageSave(msgspec.Struct, frozen=True, tag=1, array_like=True):
    """Copy a page to a slot of main memory, as its part of the block with this hash."""

    source: PageRef
    block_hash: bytes
    slot: int


class PageLoad(msgspec.Struct, frozen=True, tag=2, array_like=True):
    """Copy a page from a slot of main memory, before the layer that reads it attends."""

    block_hash: bytes
    target: PageRef
    slot: int


PageOp = PageCopy | PageSave | PageLoad


class StagePart(msgspec.Struct, frozen=True, eq=False):
    """One stage's part of a step: what it does to its pages before it computes anything, in order, and where blocks
    are from then on: `placed` is int32 `[n, 3]` of (block, region, page). Blocks of a stage that is never told of any
    are on the local page with their own number.
    """

    ops: tuple[PageOp, ...] = ()
    placed: npt.NDArray[np.int32] = msgspec.field(default_factory=lambda: np.zeros((0, 3), np.int32))


NO_PART = StagePart()
"""Nothing to do, and nothing has moved."""
