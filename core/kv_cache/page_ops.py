"""What a stage does to its pages before it computes a step, and where it then finds them. No torch here.

A page is one block's K and V of all layers of one stage. It lives in a *region*: region 0 is the stage's own device,
others are memory of another device or of the host, taken on a lease. Operations are done in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

LOCAL = 0
"""The region on the stage's own device."""

PageRef = tuple[int, int]
"""(region, page in it)"""


class BlockBuffer(Protocol):
    """A block's place in a tier below (`core.tiers`). `buffer` holds the bytes of all layers, page-first: for each
    layer in order the K page, then the V page."""

    @property
    def block(self) -> bytes:
        """The block's hash."""
        ...

    @property
    def buffer(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Copy a page: a block that moves, or one that is copied before it is written."""

    source: PageRef
    target: PageRef


@dataclass(frozen=True, slots=True)
class PageSave:
    """Copy a page to a tier below."""

    source: PageRef
    slot: BlockBuffer


@dataclass(frozen=True, slots=True)
class PageLoad:
    """Copy a page from a tier below, before the layer that reads it attends."""

    slot: BlockBuffer
    target: PageRef


PageOp = PageCopy | PageSave | PageLoad


@dataclass(frozen=True, slots=True)
class TablePages:
    """Where the blocks of one sequence are: `regions` int16 `[n]` and `pages` int32 `[n]`."""

    regions: np.ndarray
    pages: np.ndarray


@dataclass(frozen=True, slots=True)
class StageStep:
    """One stage's part of a step. `tables` has an entry per sequence; None where page numbers are block ids."""

    ops: tuple[PageOp, ...] = ()
    tables: tuple[TablePages, ...] | None = None


NOTHING = StageStep()
"""Nothing to do, and pages are where their ids say."""
