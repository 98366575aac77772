"""Which blocks to restore, and which to write down. Pure arithmetic, no torch."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from core.tiers.hotness import HeatModel
from core.tiers.records import Tier, TierSpeed


def worth_restoring(
    tiers: Sequence[Tier],
    block_nbytes: int,
    speeds: Mapping[Tier, TierSpeed],
    *,
    link_bytes_s: float,
    link_latency_s: float,
    block_recompute_s: Sequence[float],
) -> int:
    """How many leading blocks of a run to restore: the number that saves most time, 0 if none saves any.

    Restoring `n` blocks costs, for every tier `t` below host RAM that holds `b_t` of them, `latency_t + b_t*bytes/bw_t`
    and `link_latency + n*bytes/link_bw` from host RAM to the device: pieces are counted one after the other, so overlap
    only ever makes it faster than promised. Blocks in host RAM cost the link alone.

    Args:
        tiers: the tier that holds each block of the run, in order (`HierarchicalMemory.find`).
        block_nbytes: bytes of one block, all layers.
        speeds: measured speed of every tier below L3 in `tiers`.
        link_bytes_s: bytes per second from host RAM to the device, or of the slowest of several.
        link_latency_s: seconds that a copy takes to start.
        block_recompute_s: predicted seconds to compute each block's tokens, given those before it. At least as many as
            `tiers`.
    """
    best, saved_s = 0, 0.0
    counts: Counter[Tier] = Counter()
    computed = itertools.accumulate(block_recompute_s)
    for number, (tier, recompute_s) in enumerate(zip(tiers, computed, strict=False), start=1):
        counts[tier] += 1
        restore_s = link_latency_s + number * block_nbytes / link_bytes_s
        restore_s += sum(speeds[t].fetch_s(count * block_nbytes) for t, count in counts.items() if t > Tier.L3)
        if recompute_s - restore_s > saved_s:
            best, saved_s = number, recompute_s - restore_s
    return best


@dataclass(frozen=True, slots=True)
class WriteRules:
    """When a block is written to the tier below.

    `through_hotness`: at once, when it enters host RAM that hot (1 is one use just now; the default means used again
    since). `back_hotness`: when it is about to leave host RAM (the default: less than three half-lives since a single
    use).
    """

    through_hotness: float = 1.25
    back_hotness: float = 0.125


@dataclass(frozen=True, slots=True)
class MemoryOptions:
    """How a hierarchy behaves. `host_bytes` is the size of L3, `pin` makes it page-locked; `write_bytes_s` bounds
    write-back (None: unbounded), `max_queued_writes` its queue. What was written is made lasting after `seal_s` seconds
    at the latest."""

    host_bytes: int
    pin: bool = False
    heat: HeatModel = field(default_factory=HeatModel)
    rules: WriteRules = field(default_factory=WriteRules)
    write_bytes_s: float | None = None
    max_queued_writes: int = 256
    seal_s: float = 30.0
