"""`Homecoming`: where there is room at home again, blocks that live elsewhere come back, if that is worth its cost.

For every stage and lender the blocks that running sequences read are one group, and `core.lending.away` decides about
it. What comes home does so in pieces, a few blocks beside each step, those of the sequence that has most steps left
first. No torch here; called by the engine thread between steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from core.kv_cache.manager import KVCacheManager
from core.kv_cache.page_ops import LOCAL
from core.kv_cache.stage_pages import StagePages
from core.lending import AwayGroup, Choice, SiteSpeeds, decide

STEP_SHARE = 0.25
"""What comes home beside a step takes at most this share of its time, or one block."""

SpeedsOf = Callable[[int, str], SiteSpeeds]
"""Of a stage (by index) and a lender."""


@dataclass(slots=True)
class _Return:
    """Blocks of a stage that are still to come home from one device."""

    stage: int
    pages: StagePages
    blocks: list[int]
    at_once: int


class Homecoming:
    """Decides for all mapped stages of `kv`; `page_bytes` by stage index."""

    def __init__(self, kv: KVCacheManager, speeds_of: SpeedsOf, page_bytes: tuple[int, ...]) -> None:
        self.decisions = dict.fromkeys(Choice, 0)
        self._kv = kv
        self._speeds_of = speeds_of
        self._page_bytes = page_bytes
        self._returns: dict[tuple[int, str], _Return] = {}

    def consider(self, step_s: float, reserve: int) -> None:
        """Look at every group anew. `reserve` local pages stay free for what is written next."""
        self._returns.clear()
        for index, pages in self._kv.pages.mapped:
            room = pages.free_local - reserve
            if room <= 0 or not any(i != LOCAL and region.blocks for i, region in pages.regions.items()):
                continue
            local, away = self._read(pages)
            for site, sequences in away.items():
                self._consider(index, pages, site, sequences, local, room, step_s)

    def _read(self, pages: StagePages) -> tuple[int, dict[str, dict[int, list[int]]]]:
        """How many local blocks running sequences read, and their blocks elsewhere, by device and sequence."""
        local, away = 0, dict[str, dict[int, list[int]]]()
        sites = {i: region.site for i, region in pages.regions.items() if i != LOCAL and not region.closing}
        for seq_id in self._kv.sequences():
            blocks = np.array(self._kv.table(seq_id).blocks, dtype=np.int64)
            regions = pages.regions_of(blocks)
            local += int((regions == LOCAL).sum())
            for region in set(regions.tolist()) & sites.keys():
                mine = away.setdefault(sites[region], {}).setdefault(seq_id, [])
                mine += blocks[regions == region].tolist()
        return local, away

    def _consider(
        self, index: int, pages: StagePages, site: str, sequences: dict[int, list[int]], local: int, room: int,
        step_s: float,
    ) -> None:  # fmt: skip
        kv, page = self._kv, self._page_bytes[index]
        steps = {seq_id: kv.running.steps_left(seq_id) for seq_id in sequences}
        order = sorted(sequences, key=lambda seq_id: -steps[seq_id])
        blocks = list(dict.fromkeys(block for seq_id in order for block in sequences[seq_id]))
        group = AwayGroup(
            local * page, len(blocks) * page, room * page, len(sequences), max(steps.values()),
            self._recompute_s(sequences), step_s,
        )  # fmt: skip
        speeds = self._speeds_of(index, site)
        decision = decide(group, speeds)
        self.decisions[decision.choice] += 1
        if decision.choice is Choice.FETCH:
            bring = blocks[: -(-decision.nbytes // page)]
            at_once = min(STEP_SHARE * step_s * speeds.home.bandwidth_bytes_s / page, len(bring))
            self._returns[index, site] = _Return(index, pages, bring, max(1, int(at_once)))
        elif decision.choice is Choice.RECOMPUTE:
            kv.unwanted.update(sequences)

    def _recompute_s(self, sequences: dict[int, list[int]]) -> float | None:
        """To compute the sequences again from their first block that is away."""
        kv = self._kv
        token_s = kv.running.prefill_token_s
        if token_s is None:
            return None
        tokens = 0
        for seq_id, blocks in sequences.items():
            table = kv.table(seq_id)
            if any(kv.pool.is_shared(block) for block in blocks):
                return None  # others would still read it there
            away = set(blocks)
            first = next(number for number, block in enumerate(table.blocks) if block in away)
            tokens += (len(table) - first) * kv.block_size
        return tokens * token_s

    def move(self, reserve: int) -> None:
        """The part of this step: some of what is to come home, as long as there is room."""
        for entry in self._returns.values():
            for _ in range(min(entry.at_once, len(entry.blocks))):
                if entry.pages.free_local <= reserve:
                    break
                block = entry.blocks.pop(0)
                where = entry.pages.where(block)
                if where is not None and where[0] != LOCAL and self._kv.pool.ref_count(block):
                    self._kv.pages.move(entry.stage, block, LOCAL)
