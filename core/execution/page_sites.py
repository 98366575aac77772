"""A step whose pages are not all on the stage's own device: what each place holds of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from core.execution.attention.metadata import Site, build_site_batch
from core.execution.known_sequences import PackedStep
from core.execution.records import Ints
from core.kv_cache.page_ops import LOCAL

DeviceOf = Callable[[int], tuple[str, torch.device]]
"""Name and torch device of a region."""


def sites_of(
    step: PackedStep, regions: np.ndarray, pages: Ints, block_size: int, device: torch.device, device_of: DeviceOf
) -> tuple[Site, ...]:
    """The step's pages by place, the stage's own `device` first; empty if all are there."""
    used = -(-step.seq_lens // block_size)
    in_use = np.arange(regions.shape[1]) < used[:, None]
    elsewhere = set(regions[in_use].tolist()) - {LOCAL}
    if not elsewhere:
        return ()
    by_device: dict[str, list[int]] = {}
    for region in sorted(elsewhere):
        by_device.setdefault(device_of(region)[0], []).append(region)
    rows = range(step.num_sequences)
    split = _Split(step, [regions[i, : used[i]] for i in rows], [pages[i, : used[i]] for i in rows], block_size, device)
    return (
        split.site("", [LOCAL], device),
        *(split.site(name, ids, device_of(ids[0])[1]) for name, ids in by_device.items()),
    )


class _Split:
    """The blocks of a step's sequences, by region."""

    def __init__(
        self, step: PackedStep, regions: Sequence[np.ndarray], pages: Sequence[Ints], block_size: int,
        owner: torch.device,
    ) -> None:  # fmt: skip
        self._regions = regions
        self._pages = pages
        self._block_size = block_size
        self._owner = owner
        self._query_start = step.query_start
        self._counts = np.diff(step.query_start)
        self._ends = step.seq_lens
        self._positions = step.positions

    def site(self, name: str, regions: list[int], device: torch.device) -> Site:
        """What the device `name` has in these regions, of the sequences that have something there."""
        here = [index for index, at in enumerate(self._regions) if name == "" or np.isin(at, regions).any()]
        rows = np.concatenate([np.arange(self._query_start[i], self._query_start[i + 1]) for i in here])
        batches = []
        for region in regions:
            blocks = [np.flatnonzero(self._regions[i] == region) for i in here]
            batch = build_site_batch(
                [self._pages[i][at] for i, at in zip(here, blocks, strict=True)],
                blocks,
                [self._keys(int(self._ends[i]), at) for i, at in zip(here, blocks, strict=True)],
                [int(self._counts[i]) for i in here],
                self._positions[rows],
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
