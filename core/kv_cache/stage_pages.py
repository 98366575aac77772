"""One stage's pages: which page in which region holds which block. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from core.kv_cache.page_ops import LOCAL, PageCopy, PageRef

NOWHERE = -1


@dataclass(slots=True)
class Region:
    """A number of pages in one place. `site` names the device; lower `rank` is filled first. A `closing` region takes
    no more blocks: it is about to be given back."""

    region_id: int
    site: str
    num_pages: int
    rank: float = 0.0
    closing: bool = False
    free: list[int] = field(default_factory=list)
    blocks: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free = list(range(self.num_pages - 1, -1, -1))


class StagePages:
    """Blocks that hold content have one page each, new ones in region `LOCAL`, full ones anywhere. `regions` by id are
    for reading."""

    def __init__(self, num_blocks: int, local_pages: int, site: str = "") -> None:
        self.site = site
        self._region_of = np.full(num_blocks, NOWHERE, dtype=np.int16)
        self._page_of = np.full(num_blocks, NOWHERE, dtype=np.int32)
        self.regions = {LOCAL: Region(LOCAL, site, local_pages)}
        self._moved: dict[int, None] = {}

    @property
    def has_spare(self) -> bool:
        """Whether a page stays empty: with pages in several places, blocks need one to change places through."""
        return any(region_id != LOCAL and not region.closing for region_id, region in self.regions.items())

    @property
    def backed(self) -> int:
        """Blocks that can hold pages, regions that are closing left out."""
        pages = sum(region.num_pages for region in self.regions.values() if not region.closing)
        return pages - self.has_spare

    @property
    def free_local(self) -> int:
        return len(self.regions[LOCAL].free)

    @property
    def local_pages(self) -> int:
        return self.regions[LOCAL].num_pages

    def add(self, region_id: int, site: str, num_pages: int, rank: float) -> None:
        """A new region with room for `num_pages` blocks."""
        self.regions[region_id] = Region(region_id, site, num_pages, rank)

    def remove(self, region_id: int) -> None:
        """Forget an empty region."""
        if self.regions[region_id].blocks or region_id == LOCAL:
            raise ValueError(f"region {region_id} still holds blocks")
        del self.regions[region_id]

    def where(self, block: int) -> PageRef | None:
        """The block's page; None if it has none."""
        region = int(self._region_of[block])
        return None if region == NOWHERE else (region, int(self._page_of[block]))

    def is_local(self, block: int) -> bool:
        return bool(self._region_of[block] == LOCAL)

    def local_among(self, blocks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Those of the blocks that are on the stage's own device, in order."""
        return blocks[np.flatnonzero(self._region_of[blocks] == LOCAL)]

    def house(self, block: int) -> PageRef:
        """Give a block without a page a local one; the caller has seen to it that one is free."""
        return self._put(block, self.regions[LOCAL])

    def _put(self, block: int, region: Region) -> PageRef:
        page = region.free.pop()
        region.blocks[page] = block
        self._region_of[block], self._page_of[block] = region.region_id, page
        self._moved[block] = None
        return region.region_id, page

    def drop(self, block: int) -> None:
        """Free the block's page; nothing if it has none."""
        ref = self.where(block)
        if ref is None:
            return
        region = self.regions[ref[0]]
        del region.blocks[ref[1]]
        region.free.append(ref[1])
        self._region_of[block] = self._page_of[block] = NOWHERE

    def move(self, block: int, region_id: int) -> PageCopy:
        """Move a block to a region with a free page."""
        source = self.where(block)
        if source is None:
            raise ValueError(f"block {block} has no page to move")
        self.drop(block)
        return PageCopy(source, self._put(block, self.regions[region_id]))

    def roomy(self, *, local: bool = False) -> Iterator[Region]:
        """Regions that take blocks and have free pages, in the order in which they are filled; with `local`, the
        stage's own pages first."""
        for region in sorted(self.regions.values(), key=lambda item: (item.region_id != LOCAL, item.rank)):
            if region.free and not region.closing and (local or region.region_id != LOCAL):
                yield region

    def regions_of(self, blocks: npt.NDArray[np.int64]) -> npt.NDArray[np.int16]:
        """The regions that hold these blocks."""
        return self._region_of[blocks]

    def take_moved(self) -> npt.NDArray[np.int32]:
        """Int32 `[n, 3]`, (block, region, page), of all blocks that have got a page since the last call and still have
        one."""
        moved = np.fromiter(self._moved, dtype=np.int32, count=len(self._moved))
        self._moved.clear()
        placed = np.stack((moved, self._region_of[moved].astype(np.int32), self._page_of[moved]), axis=1)
        return placed[np.flatnonzero(placed[:, 1] != NOWHERE)]

    def check_invariants(self, holding: Iterable[int]) -> None:
        """Raise `AssertionError` unless exactly the blocks `holding` content have one page each."""
        placed = np.flatnonzero(self._region_of != NOWHERE).tolist()
        if sorted(holding) != placed:
            wrong = set(placed) ^ set(holding)
            raise AssertionError(f"{self.site}: blocks {sorted(wrong)[:10]} hold content or a page, but not both")
        for region in self.regions.values():
            if sorted([*region.free, *region.blocks]) != list(range(region.num_pages)):
                raise AssertionError(f"{self.site}: pages of region {region.region_id} are lost or held twice")
            for page, block in region.blocks.items():
                if self.where(block) != (region.region_id, page):
                    raise AssertionError(f"{self.site}: page {page} of region {region.region_id} is not {block}'s")
