"""A step whose pages are not all on the stage's own device: what each place holds of it."""

from __future__ import annotations

from collections.abc import Callable

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
    tables = [(regions[index, :count], pages[index, :count]) for index, count in enumerate(used)]
    starts, lengths, counts = step.query_start, step.seq_lens.tolist(), np.diff(step.query_start).tolist()

    def site(name: str, ids: list[int], where: torch.device) -> Site:
        """What the device `name` has in these regions, of the sequences that have something there."""
        here = [index for index, (at, _) in enumerate(tables) if name == "" or np.isin(at, ids).any()]
        rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in here])
        batches = []
        for region in ids:
            blocks = [np.flatnonzero(tables[i][0] == region) for i in here]
            batch = build_site_batch(
                [tables[i][1][at] for i, at in zip(here, blocks, strict=True)],
                blocks,
                [_keys(lengths[i], at, block_size) for i, at in zip(here, blocks, strict=True)],
                [counts[i] for i in here],
                step.positions[rows],
                block_size,
                where,
            )
            batches.append((region, batch))
        return Site(name, torch.from_numpy(rows).to(device), tuple(batches))

    others = (site(name, ids, device_of(ids[0])[1]) for name, ids in by_device.items())
    return (site("", [LOCAL], device), *others)


def _keys(end: int, blocks: np.ndarray, block_size: int) -> int:
    """Tokens in these blocks of a sequence of `end` tokens; only its last block may be part full."""
    if not len(blocks):
        return 0
    return (len(blocks) - 1) * block_size + min(block_size, end - int(blocks[-1]) * block_size)
