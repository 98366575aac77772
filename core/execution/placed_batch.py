"""A step's attention metadata for a stage whose pages are not where their block ids say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from core.execution.attention.metadata import Site, build_site_batch
from core.execution.input_batch import InputBatch, pad_tables
from core.execution.schedule import ScheduledSequence
from core.kv_cache.page_ops import LOCAL, TablePages

DeviceOf = Callable[[int], tuple[str, torch.device]]
"""Name and torch device of a region."""


def place_batch(
    batch: InputBatch,
    sequences: Sequence[ScheduledSequence],
    tables: Sequence[TablePages],
    block_size: int,
    device: torch.device,
    device_of: DeviceOf,
) -> InputBatch:
    """`batch` (on the CPU) for one stage on `device`, with pages in place of block ids. If all pages are local, that is
    all; otherwise the metadata has `sites`.
    """
    used = [-(-item.end // block_size) for item in sequences]
    regions = [table.regions[:count] for table, count in zip(tables, used, strict=True)]
    pages = [table.pages[:count] for table, count in zip(tables, used, strict=True)]
    slots = np.concatenate([_slots(item, page, block_size) for item, page in zip(sequences, pages, strict=True)])
    placed = replace(
        batch.attention,
        slot_mapping=torch.from_numpy(slots),
        block_tables=torch.from_numpy(pad_tables(pages)),
    )
    moved = replace(batch, attention=placed).to(device)
    elsewhere = set(np.concatenate(regions).tolist()) - {LOCAL}
    if not elsewhere:
        return moved
    by_device: dict[str, list[int]] = {}
    for region in sorted(elsewhere):
        by_device.setdefault(device_of(region)[0], []).append(region)
    split = _Split(sequences, regions, pages, block_size, device)
    sites = [
        split.site("", [LOCAL], device),
        *(split.site(n, ids, device_of(ids[0])[1]) for n, ids in by_device.items()),
    ]
    return replace(moved, attention=replace(moved.attention, sites=tuple(sites)))


def _slots(item: ScheduledSequence, pages: np.ndarray, block_size: int) -> np.ndarray:
    """int64 slots of a sequence's new tokens, which are all local."""
    positions = np.arange(item.start, item.end, dtype=np.int64)
    return pages[positions // block_size].astype(np.int64) * block_size + positions % block_size


class _Split:
    """The blocks of a step's sequences, by region."""

    def __init__(
        self, sequences: Sequence[ScheduledSequence], regions: list[np.ndarray], pages: list[np.ndarray],
        block_size: int, owner: torch.device,
    ) -> None:  # fmt: skip
        self._sequences = sequences
        self._regions = regions
        self._pages = pages
        self._block_size = block_size
        self._owner = owner
        self._starts = np.concatenate(([0], np.cumsum([item.num_tokens for item in sequences])))

    def site(self, name: str, regions: list[int], device: torch.device) -> Site:
        """What the device `name` has in these regions, of the sequences that have something there."""
        here = [index for index, at in enumerate(self._regions) if name == "" or np.isin(at, regions).any()]
        rows = np.concatenate([np.arange(self._starts[i], self._starts[i + 1]) for i in here])
        query_at = np.concatenate([np.arange(self._sequences[i].start, self._sequences[i].end) for i in here])
        batches = []
        for region in regions:
            blocks = [np.flatnonzero(self._regions[i] == region) for i in here]
            batch = build_site_batch(
                [self._pages[i][at] for i, at in zip(here, blocks, strict=True)],
                blocks,
                [self._keys(self._sequences[i].end, at) for i, at in zip(here, blocks, strict=True)],
                [self._sequences[i].num_tokens for i in here],
                query_at,
                self._block_size,
                device,
            )
            batches.append((region, batch))
        return Site(name, torch.from_numpy(rows).to(self._owner), tuple(batches))

    def _keys(self, end: int, blocks: np.ndarray) -> int:
        """Tokens in these blocks of a sequence of `end` tokens; only its last block may be part full."""
        if not len(blocks):
            return 0
        return (len(blocks) - 1) * self._block_size + min(self._block_size, end - int(blocks[-1]) * self._block_size)
