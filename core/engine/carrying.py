"""KV that a model takes along when it moves: full blocks of the old engine become cached blocks of the new one.

Requests that are taken over find them as they find any prefix, so all that is computed again is what no full block has:
the last few tokens of each. Nothing computes in either engine meanwhile. Where a network would take longer than
computing, everything is computed again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from core.cluster.placed_stage import PlacedRemoteStage
from core.engine.model_engine import ModelEngine
from core.engine.stages import EngineStage
from core.execution.stage import Stage
from core.kv_cache.manager import KVCacheManager
from core.logs import get_logger

logger = get_logger(__name__)

CHUNK_BYTES = 4 << 20
"""That crosses a network in one message: signs of life come between two."""
AT_ONCE = 3
"""Messages on their way at the same time: one is packed, one travels, one is unpacked."""
GROUP_BYTES = 64 << 20
"""That is packed at once on a device."""


@dataclass(frozen=True, slots=True)
class Content:
    """A full block of the old engine: its number, its hash and that of the block before it."""

    block: int
    digest: bytes
    parent: bytes | None


@dataclass(frozen=True, slots=True)
class Way:
    """Layers that a stage of the old engine and one of the new have in common; `at` and `to` number these stages."""

    at: int
    source: EngineStage
    to: int
    target: EngineStage
    layers: tuple[int, ...]

    @property
    def page_bytes(self) -> int:
        """Of these layers."""
        assert self.source.kv is not None
        return sum(self.source.kv.layer_bytes[layer] for layer in self.layers)

    @property
    def stays_on_a_node(self) -> bool:
        """Whether both stages are on the same other machine."""
        source, target = self.source, self.target
        return (
            isinstance(source, PlacedRemoteStage)
            and isinstance(target, PlacedRemoteStage)
            and (source.node is target.node)
        )

    @property
    def is_here(self) -> bool:
        """Whether no network lies on it."""
        return isinstance(self.source, Stage) and isinstance(self.target, Stage)


def contents(kv: KVCacheManager, *, cached: bool) -> list[Content]:
    """Full blocks of a manager that is at rest: those of its sequences, then, if wanted, what is `cached` beside, last
    used first."""
    pool, found = kv.pool, dict[bytes, Content]()
    used = [block for seq_id in kv.sequences() for block in kv.table(seq_id).blocks]
    for block in [*used, *(reversed(pool.cached_blocks()) if cached else ())]:
        digest = pool.hash_of(block)
        if digest is not None:
            found.setdefault(digest, Content(block, digest, pool.parent_of(digest)))
    return list(found.values())


def ways_between(old: Sequence[EngineStage], new: Sequence[EngineStage]) -> list[Way]:
    """All stages that have layers in common."""
    found = []
    for at, source in enumerate(old):
        for to, target in enumerate(new):
            first, last = max(source.part.first, target.part.first), min(source.part.last, target.part.last)
            if first < last:
                found.append(Way(at, source, to, target, tuple(range(first, last))))
    return found


class Carrier:
    """From `old`, which is parked, to `new`, which is idle. `recompute_s` is what computing all of it would take, None
    where that is not known."""

    def __init__(self, old: ModelEngine, new: ModelEngine, recompute_s: float | None) -> None:
        self._old, self._new = old, new
        self._recompute_s = recompute_s
        self._ways = ways_between(old.stages, new.stages)

    def run(self) -> int:
        """Tokens whose KV was taken along. In the new engine's thread. What goes wrong is logged."""
        kv = self._new.kv
        if self._old.kv.block_size != kv.block_size or not kv.pool.enable_prefix_caching:
            return 0
        crosses = any(not (way.is_here or way.stays_on_a_node) for way in self._ways)
        wanted = contents(self._old.kv, cached=not crosses)  # requests wait for no more than they need
        if not wanted or not self._is_quicker(len(wanted)):
            return 0
        taken = kv.take_in(len(wanted))
        wanted = wanted[: len(taken)]
        began_s = time.monotonic()
        try:
            for way in self._ways:
                self._move(way, wanted, taken)
        except Exception as error:  # noqa: BLE001  whatever it was: KV can be computed again
            logger.warning("KV could not be taken along; it is computed again", reason=repr(error))
            kv.give_in(taken, ())
            return 0
        kv.give_in(taken, [(each.digest, each.parent) for each in wanted])
        tokens = len(wanted) * kv.block_size
        logger.info("KV was taken along", tokens=tokens, seconds=round(time.monotonic() - began_s, 3))
        return tokens

    def _is_quicker(self, blocks: int) -> bool:
        """By the links to other machines as they were measured. On one machine it always is."""
        seconds = sum(
            stage.node.speed.latency_s + blocks * way.page_bytes / max(1.0, stage.node.speed.bandwidth_bytes_s)
            for way in self._ways
            for stage in (way.source, way.target)
            if isinstance(stage, PlacedRemoteStage) and not way.stays_on_a_node
        )
        return self._recompute_s is None or seconds < self._recompute_s

    def _move(self, way: Way, wanted: Sequence[Content], taken: Sequence[int]) -> None:
        """Pages of a way, in groups that lie in the same regions."""
        source, target = self._old.kv.pages, self._new.kv.pages
        pairs: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for content, block in zip(wanted, taken, strict=True):
            (region, page), (to_region, to_page) = source.ref(way.at, content.block), target.ref(way.to, block)
            pairs.setdefault((region, to_region), []).append((page, to_page))
        at_once = max(1, (GROUP_BYTES if way.is_here else CHUNK_BYTES) // way.page_bytes)
        groups: list[tuple[int, int, list[int], list[int]]] = []
        for (region, to_region), found in pairs.items():
            for first in range(0, len(found), at_once):
                part = found[first : first + at_once]
                groups.append((region, to_region, [page for page, _ in part], [other for _, other in part]))
        if way.is_here:
            for group in groups:
                self._copy(way, *group)
            return
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="vrm-carrying") as pool:
            for future in [pool.submit(self._copy, way, *group) for group in groups]:
                future.result()

    def _copy(self, way: Way, region: int, to_region: int, pages: Sequence[int], others: Sequence[int]) -> None:
        source, target, layers = way.source, way.target, way.layers
        if way.stays_on_a_node:
            assert isinstance(source, PlacedRemoteStage) and isinstance(target, PlacedRemoteStage)
            source.copy_pages(pages, target, others, layers, (region, to_region))
            return
        with torch.inference_mode():
            if isinstance(source, PlacedRemoteStage):
                data = source.read_pages(pages, layers, region)
            else:
                assert source.kv is not None
                data = source.kv.pack(region, pages, layers)
                if isinstance(target, Stage):
                    assert target.kv is not None
                    where = source.kv.region(region).device, target.kv.region(to_region).device
                    data = self._new.transfer.send(data, *where)
            if isinstance(target, PlacedRemoteStage):
                target.write_pages(others, data, layers, to_region)
            else:
                assert target.kv is not None
                data = data.to(target.kv.region(to_region).device.torch_device)
                target.kv.unpack(to_region, others, data, layers)
