"""Blocks on the move: whatever moves, every stage finds in a block what was written into it.

Memory is modelled: each stage carries out its part of the steps in order, as late as it likes, while the map changes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelled_memory import BLOCK, BLOCKS, FakeTiers, Item, Memory

from core.kv_cache.manager import KVCacheManager
from core.kv_cache.page_ops import LOCAL, StagePart
from core.kv_cache.stage_pages import StagePages


@dataclass
class Live:
    tokens: list[int]
    scheduled: int
    computed: int
    in_flight: int = 0


class World:
    """Three stages, of which the first has room for all blocks; sequences that come, grow, fork and go."""

    def __init__(self, rng: Random, local: tuple[int, int] = (5, 7)) -> None:
        self.rng = rng
        stages = [None, *(StagePages(BLOCKS, pages, f"s{i}") for i, pages in enumerate(local))]
        self.kv = KVCacheManager(BLOCKS, BLOCK, stages=stages, tiers=FakeTiers)
        assert isinstance(self.kv.tiers, FakeTiers)
        self.tiers = self.kv.tiers
        self.memories = [Memory(i, pages, self.tiers.buffers) for i, pages in enumerate((BLOCKS, *local))]
        self.queues: list[deque[tuple[int, StagePart, list[Item]]]] = [deque() for _ in stages]
        self.passed = [0 for _ in stages]
        self.flying: deque[tuple[int, list[Item]]] = deque()
        self.live: dict[int, Live] = {}
        self.leaving: dict[tuple[int, int], int | None] = {}
        self.step = self.next_seq = self.next_region = 0
        self.mapped = dict(self.kv.pages.mapped)
        self.moves = 0

    # -- sequences --------------------------------------------------------------------------------------------------

    def open(self) -> None:
        if len(self.live) > 2:
            return self.close()
        tokens = [self.rng.randint(0, 1) for _ in range(self.rng.randint(1, 12))]
        self.next_seq += 1
        self.kv.prefetch(self.next_seq, tokens, lambda: None)
        cached = self.kv.open(self.next_seq, tokens, read_prefix=True)
        self.live[self.next_seq] = Live(tokens, cached, cached)
        return None

    def fork(self) -> None:
        """As siblings do: what was computed last is computed again."""
        ready = [(i, live) for i, live in self.live.items() if live.computed > 1 and not live.in_flight]
        if ready:
            parent, live = self.rng.choice(ready)
            count = live.computed - 1
            self.next_seq += 1
            self.kv.fork(parent, self.next_seq, count)
            self.live[self.next_seq] = Live([*live.tokens[: count + 1], 2], count, count)

    def close(self) -> None:
        ready = [i for i, live in self.live.items() if not live.in_flight]
        if ready:
            seq_id = self.rng.choice(ready)
            self.kv.close(seq_id)
            del self.live[seq_id]

    def evict(self) -> None:
        cached = self.kv.pool.cached_blocks()
        if cached:
            self.kv.pool.evict(self.rng.choice(cached))

    def schedule(self) -> None:
        chosen = []
        for seq_id, live in self.live.items():
            left = len(live.tokens) - live.scheduled
            if left and self.rng.random() < 0.8:
                count = self.rng.randint(1, left)
                if self.kv.grow(seq_id, live.scheduled, live.scheduled + count):
                    chosen.append((seq_id, live, count))
        items = []
        for seq_id, live, count in chosen:
            end, blocks = live.scheduled + count, list(self.kv.table(seq_id).blocks)
            items.append(Item(seq_id, tuple(live.tokens[:end]), live.scheduled, end, blocks))
            live.scheduled, live.in_flight = end, live.in_flight + 1
        self.step += 1
        parts = self.kv.take_step(self.step)
        for index, queue in enumerate(self.queues):
            queue.append((self.step, parts[index], items))
        self.flying.append((self.step, items))
        for key, last in self.leaving.items():
            if last is None and not self.mapped[key[0]].regions[key[1]].blocks:
                self.leaving[key] = self.step

    def advance(self) -> None:
        """Some stages carry out a step; steps reach the stages in order."""
        for _ in range(4):
            self.advance_one()

    def advance_one(self) -> None:
        ready = [i for i, q in enumerate(self.queues) if q and (i == 0 or self.passed[i - 1] >= q[0][0])]
        if ready:
            index = self.rng.choice(ready)
            number, part, items = self.queues[index].popleft()
            self.memories[index].run(part, items)
            self.passed[index] = number
        while self.flying and self.flying[0][0] <= self.passed[-1]:
            self.done(*self.flying.popleft())

    def done(self, step: int, items: list[Item]) -> None:
        self.kv.step_done(step)
        for item in items:
            live = self.live[item.seq_id]
            live.in_flight, live.computed = live.in_flight - 1, item.end
            self.kv.commit(item.seq_id, live.tokens, item.end)
            if item.end == len(live.tokens) and item.end < 14:
                live.tokens.append(self.rng.randint(0, 1))
        for (index, region), last in list(self.leaving.items()):
            if last is not None and last <= step:
                del self.leaving[index, region], self.memories[index].regions[region]
                self.mapped[index].remove(region)

    # -- memory -----------------------------------------------------------------------------------------------------

    def add_region(self) -> None:
        index, pages = self.rng.choice(list(self.mapped.items()))
        self.next_region += 1
        count = self.rng.randint(1, 5)
        pages.add(self.next_region, "lender", count, rank=self.rng.random())
        self.memories[index].add(self.next_region, count)
        self.kv.refresh_limit()

    def close_region(self) -> None:
        """Only as far as what is referenced still has pages: a scheduler would preempt first."""
        index, pages = self.rng.choice(list(self.mapped.items()))
        open_ones = [region for i, region in pages.regions.items() if i != LOCAL and not region.closing]
        if open_ones:
            region = self.rng.choice(open_ones)
            region.closing = True
            if pages.backed < self.kv.pool.num_referenced:
                region.closing = False
                return
            self.kv.refresh_limit()
            self.leaving[index, region.region_id] = None

    def empty_region(self) -> None:
        for index, region_id in self.leaving:
            pages = self.mapped[index]
            for block in list(pages.regions[region_id].blocks.values())[: self.rng.randint(1, 4)]:
                target = next(pages.roomy(local=True), None)
                assert target is not None, "there are pages for all that holds content"
                self.move(index, block, target.region_id)

    def stir(self) -> None:
        """A block that is not being written may be anywhere."""
        index, pages = self.rng.choice(list(self.mapped.items()))
        full = {b for i in self.live for b in self.kv.table(i).blocks[: self.kv.table(i).num_full]}
        blocks = sorted(full | set(self.kv.pool.cached_blocks()))
        targets = list(pages.roomy(local=True))
        if blocks and targets:
            block, target = self.rng.choice(blocks), self.rng.choice(targets)
            if pages.where(block) is not None:
                self.move(index, block, target.region_id)

    def move(self, index: int, block: int, region_id: int) -> None:
        self.kv.pages.move(index, block, region_id)
        self.moves += 1

    # -- the whole --------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Nothing is in flight; all operations are carried out."""
        self.schedule()
        while self.flying:
            self.advance()

    def check(self) -> None:
        self.kv.check_invariants(self.live)
        for index, pages in self.mapped.items():
            assert set(pages.regions) == set(self.memories[index].regions)
            for region_id, region in pages.regions.items():
                assert len(region.blocks) <= len(self.memories[index].regions[region_id])

    def check_contents(self) -> None:
        """When all is settled: every stage has what was computed, wherever it is."""
        for index, memory in enumerate(self.memories):
            for seq_id, live in self.live.items():
                blocks = self.kv.table(seq_id).blocks
                for position in range(live.computed):
                    ref = self.kv.pages.ref(index, blocks[position // BLOCK])
                    assert memory.page(ref)[position % BLOCK] == tuple(live.tokens[: position + 1])


ACTIONS = (
    ("open", 3), ("fork", 1), ("close", 3), ("evict", 1), ("schedule", 5), ("advance", 12), ("add_region", 1),
    ("close_region", 1), ("empty_region", 2), ("stir", 3),
)  # fmt: skip
NAMES, WEIGHTS = zip(*ACTIONS, strict=True)


def run_world(seed: int, steps: int = 150) -> World:
    rng = Random(seed)
    world = World(rng, (rng.randint(3, 8), rng.randint(3, BLOCKS - 1)))
    for _ in range(steps):
        getattr(world, rng.choices(NAMES, WEIGHTS)[0])()
        world.check()
    world.settle()
    world.check()
    world.check_contents()
    return world


@settings(max_examples=60)
@given(st.integers(0, 1 << 30))
def test_whatever_moves_every_stage_finds_what_was_written(seed: int) -> None:
    run_world(seed)


def test_the_histories_do_all_there_is_to_do() -> None:
    worlds = [run_world(seed) for seed in range(20)]
    assert sum(world.moves for world in worlds) > 100
    assert sum(world.tiers.restored for world in worlds) > 5
    assert sum(len(world.tiers.kept) for world in worlds) > 20
    assert any(set(memory.regions) != {LOCAL} for world in worlds for memory in world.memories)
    assert sum(world.kv.pages.moved_home for world in worlds) > 20


def test_operations_out_of_order_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Memory.run

    def backwards(self: Memory, step: StagePart, items: Sequence[Item]) -> None:
        run(self, StagePart(tuple(reversed(step.ops)), step.placed), items)

    monkeypatch.setattr(Memory, "run", backwards)
    seeds = iter(range(20))
    with pytest.raises((AssertionError, KeyError)):
        _ = [run_world(seed) for seed in seeds]


def test_a_closing_region_takes_no_blocks() -> None:
    pages = StagePages(8, 2, "own")
    pages.add(1, "lender", 4, rank=0)
    pages.add(2, "host", 4, rank=1)
    assert [region.region_id for region in pages.roomy()] == [1, 2]
    assert pages.backed == 9, "one page stays empty, for blocks to change places through"
    pages.regions[1].closing = True
    assert [region.region_id for region in pages.roomy()] == [2]
    assert pages.backed == 5
    pages.regions[2].closing = True
    assert pages.backed == 2


def test_a_region_that_holds_blocks_is_not_forgotten() -> None:
    pages = StagePages(4, 2, "own")
    pages.add(1, "lender", 2, rank=0)
    pages.house(0)
    pages.move(0, 1)
    with pytest.raises(ValueError, match="still holds"):
        pages.remove(1)


def test_a_stage_keeps_its_own_region_even_when_it_is_empty() -> None:
    pages = StagePages(4, 2, "own")
    with pytest.raises(ValueError, match=f"region {LOCAL}"):
        pages.remove(LOCAL)
    assert pages.local_pages == pages.free_local == 2
