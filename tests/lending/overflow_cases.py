"""Stages that lack pages, lenders, and what the batcher does between steps, with modelled memory and time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Any

from lending.pools import Clock, gpu, host, make_pool
from modelled_memory import BLOCK, Item, Memory

from core.costs import LinkProfile
from core.errors import OutOfDeviceMemoryError
from core.kv_cache.manager import KVCacheManager
from core.kv_cache.page_ops import LOCAL, StagePart
from core.kv_cache.stage_pages import StagePages
from core.lending import GPUBudget, Lease, LeaseState, SiteSpeeds, Urgency
from core.lending.homecoming import Homecoming
from core.lending.overflow import DeviceUse, KVOverflow

PAGE = 10
"""Bytes of a page of stage 0; those of stage i are i + 1 times as large."""
RATIO, THRESHOLD = 0.7, 0.8
STEP_S = 0.02


class FakeStore:
    """Regions in modelled memory. A device in `refusing` has none, whatever it lends."""

    def __init__(self, memories: Sequence[Memory]) -> None:
        self.memories = memories
        self.regions: dict[tuple[int, int], tuple[str, int]] = {}
        self.asked: list[tuple[str, int]] = []
        self.dropped: list[tuple[str, int]] = []
        self.refusing: set[str] = set()

    def add(self, stage: int, region_id: int, device: str, pages: int) -> None:
        self.asked.append((device, pages))
        if device in self.refusing:
            raise OutOfDeviceMemoryError(f"{device} has no {pages} pages")
        assert (stage, region_id) not in self.regions
        self.memories[stage].add(region_id, pages)
        self.regions[stage, region_id] = device, pages

    def drop(self, stage: int, region_id: int) -> None:
        """What still has to be done with the region's pages raises `KeyError` from now on."""
        self.dropped.append(self.regions.pop((stage, region_id)))
        del self.memories[stage].regions[region_id]

    def bytes_on(self, device: str) -> int:
        return sum(pages * PAGE * (stage + 1) for (stage, _), (at, pages) in self.regions.items() if at == device)


@dataclass
class Live:
    """A sequence. Its blocks hold `computed` tokens; with steps in flight, more are `scheduled`."""

    tokens: list[int]
    scheduled: int = 0
    computed: int = 0
    in_flight: int = 0


def lenders(idle: str = "x") -> list[GPUBudget]:
    """The one that is idle is asked first. Beyond the limit there is a margin of 2 %."""
    return [gpu(name, limit=9800, total=10_000, idle_s=float(name == idle)) for name in ("x", "y")]


class Rig:
    """`local` pages of each stage; every block has to have one in each. Steps are carried out when they are done, as
    late as can be, so that whatever was taken away too early is missed."""

    def __init__(
        self,
        local: Sequence[int] = (8,),
        *,
        blocks: int = 64,
        extent: int = 8,
        budgets: Iterable[GPUBudget] | None = None,
        observe_s: float = 0.0,
        depth: int = 1,
    ) -> None:
        self.clock = Clock()
        stages = [StagePages(blocks, pages, f"s{i}") for i, pages in enumerate(local)]
        budgets = lenders() if budgets is None else list(budgets)
        named = {budget.name for budget in budgets}
        budgets += [gpu(s.site, limit=0, total=1000) for s in stages if s.site not in named]
        self.use = {b.name: DeviceUse(b.name, b.own_bytes, b.external_bytes, b.idle_s) for b in budgets}
        self.pool = make_pool(*budgets, lend_ratio=RATIO, reclaim_threshold=THRESHOLD, clock=self.clock)
        self.memories = [Memory(i, pages) for i, pages in enumerate(local)]
        self.store = FakeStore(self.memories)
        overflow = partial(
            KVOverflow, lending=self.pool, store=self.store, page_bytes=[PAGE * (i + 1) for i in range(len(local))],
            extent_blocks=extent, observe=self.use.values, observe_s=observe_s, clock=self.clock,
        )  # fmt: skip
        self.kv = KVCacheManager(blocks, BLOCK, stages=stages, lender=overflow)
        assert isinstance(self.kv.lender, KVOverflow)
        self.overflow = self.kv.lender
        self.depth = depth
        self.live: dict[int, Live] = {}
        self.flying: deque[tuple[int, tuple[StagePart, ...], list[Item]]] = deque()
        self.step = self.last_seq = self.computed_steps = self.preempted = 0
        self.moves: list[int] = []
        self.rounds_left = 2000

    def uses(self, device: str, own: int = 0, external: int = 0) -> None:
        """From the next look at it on."""
        self.use[device] = replace(self.use[device], own_bytes=own, external_bytes=external)

    def lent(self, device: str) -> int:
        return self.pool.budget(device).lent_bytes

    # -- sequences --------------------------------------------------------------------------------------------------

    def open(self, tokens: Iterable[int]) -> int:
        self.last_seq += 1
        live = self.live[self.last_seq] = Live(list(tokens))
        live.scheduled = live.computed = self.kv.open(self.last_seq, live.tokens, read_prefix=True)
        return self.last_seq

    def fill(self, blocks: int) -> int:
        """A sequence that nothing was known of, computed step by step as far as a stage's own pages allow."""
        seq_id = self.open(range(self.last_seq * 1000, self.last_seq * 1000 + blocks * BLOCK))
        while self.live[seq_id].computed < blocks * BLOCK:
            item = self.extend(seq_id, BLOCK)
            assert item is not None
            self.take([item])
            self.finish()
        return seq_id

    def extend(self, seq_id: int, count: int) -> Item | None:
        """The part of a step that computes `count` tokens; 0 reads what is there. None: there is no room."""
        live = self.live[seq_id]
        start, end = live.scheduled, live.scheduled + count
        if count and not self.kv.grow(seq_id, start, end):
            return None
        live.scheduled, live.in_flight = end, live.in_flight + 1
        return Item(seq_id, tuple(live.tokens[:end]), start, end, list(self.kv.table(seq_id).blocks))

    def close(self, seq_id: int) -> None:
        del self.live[seq_id]
        self.kv.close(seq_id)

    def refresh_last(self, seq_id: int) -> Item | None:
        """A decode: the last token is computed again, the others are read."""
        live = self.live[seq_id]
        if not live.scheduled or not self.kv.grow(seq_id, live.scheduled - 1, live.scheduled):
            return None
        item = self.extend(seq_id, 0)
        assert item is not None
        return replace(item, start=item.end - 1)

    # -- steps ------------------------------------------------------------------------------------------------------

    def take(self, items: Sequence[Item] = ()) -> None:
        self.step += 1
        parts = self.kv.take_step(self.step)
        self.flying.append((self.step, parts, list(items)))
        self.moves.append(sum(len(part.ops) for part in parts))

    def finish(self) -> None:
        """The oldest step in flight is carried out and done."""
        step, parts, items = self.flying.popleft()
        for memory, part in zip(self.memories, parts, strict=True):
            memory.run(part, items)
        self.kv.step_done(step)
        for item in items:
            live = self.live[item.seq_id]
            live.in_flight, live.computed = live.in_flight - 1, max(live.computed, item.end)
            self.kv.commit(item.seq_id, live.tokens, live.computed)

    def tick(self, waiting_blocks: int = 0) -> None:
        """As the batcher does before every step."""
        self.kv.tick(waiting_blocks)
        while self.kv.pool.num_referenced > self.kv.pool.limit:
            ready = [seq_id for seq_id, live in self.live.items() if not live.in_flight]
            if not ready:
                return
            self.close(ready[-1])
            self.preempted += 1
            self.kv.refresh_limit()

    def round(self, compute: Callable[[], Any] | None = None) -> None:
        """What the batcher does for one step, with `depth` steps in flight at most; then a step's time goes by."""
        self.rounds_left -= 1
        assert self.rounds_left, "it goes on for ever"
        self.tick()
        if not self.kv.wants_stop:
            (compute or self.decode)()
            self.computed_steps += 1
            if len(self.flying) >= self.depth:
                self.finish()
        elif self.flying:
            self.finish()
        elif self.kv.pages.has_ops:
            self.take()
            self.finish()
        self.clock.now_s += STEP_S
        self.check()

    def decode(self) -> None:
        """Every sequence computes a token."""
        self.take([item for item in map(self.refresh_last, list(self.live)) if item is not None])

    def rounds(self, seconds: float) -> None:
        until_s = self.clock.now_s + seconds
        while self.clock.now_s < until_s:
            self.round()

    def land(self) -> None:
        while self.flying:
            self.finish()

    # -- what has to be so ------------------------------------------------------------------------------------------

    def check(self) -> None:
        self.kv.check_invariants(self.live)
        self.overflow.check_invariants()
        self.pool.check_invariants()
        for name in self.use:
            budget = self.pool.budget(name)
            assert self.store.bytes_on(name) == budget.lent_bytes
            most = budget.limit_bytes if budget.last_resort else int(RATIO * budget.total_bytes)
            assert budget.lent_bytes <= min(most, budget.limit_bytes)
        for index, pages in self.kv.pages.mapped:
            assert set(pages.regions) == set(self.memories[index].regions)
            blocks = {block for seq_id in self.live for block in self.kv.table(seq_id).blocks}
            refs = [pages.where(block) for block in blocks]
            assert None not in refs and len(set(refs)) == len(refs)

    def check_contents(self) -> None:
        """When nothing is in flight: every stage has what was computed, wherever it is."""
        self.take()
        self.finish()
        for index, pages in self.kv.pages.mapped:
            for seq_id, live in self.live.items():
                blocks = self.kv.table(seq_id).blocks
                for position in range(live.computed):
                    ref = pages.where(blocks[position // BLOCK])
                    assert ref is not None
                    assert self.memories[index].page(ref)[position % BLOCK] == tuple(live.tokens[: position + 1])

    # -- questions --------------------------------------------------------------------------------------------------

    def leases(self, lender: str | None = None) -> list[Lease]:
        return list(self.pool.leases(lender=lender))

    def under_reclaim(self) -> bool:
        return any(lease.state is LeaseState.RECLAIMING for lease in self.pool.leases())

    def away(self, stage: int = 0) -> dict[int, list[int]]:
        """Blocks of each region that is not the stage's own."""
        pages = dict(self.kv.pages.mapped)[stage]
        return {i: sorted(region.blocks.values()) for i, region in pages.regions.items() if i != LOCAL}


class Chaos(Rig):
    """Sequences that come, grow, fork and go over two stages that borrow from each other, from two GPUs and from main
    memory, while lenders change their minds."""

    ACTIONS = {
        "start": 3, "fork": 1, "end": 2, "forget": 1, "compute": 14, "land_one": 5, "look": 6,
        "use_devices": 2, "reclaim": 4, "withdraw": 1, "refuse": 1, "wait": 2,
    }  # fmt: skip

    def __init__(self, rng: Random) -> None:
        budgets = [
            gpu("x", limit=290, total=300), gpu("y", limit=200), host(300), gpu("s0", limit=100, total=120),
            gpu("s1", limit=100),
        ]  # fmt: skip
        super().__init__(
            (rng.randint(4, 10), rng.randint(6, 16)), blocks=24, extent=rng.randint(2, 6), budgets=budgets,
            observe_s=0.05, depth=2,
        )  # fmt: skip
        self.rng = rng
        self.reclaims = 0
        self.kv.running.steps_left = lambda seq_id: rng.choice((1, 100))  # type: ignore[method-assign]
        if rng.random() < 0.5:  # blocks come home where there is room again
            link = LinkProfile(1e5, 1e-4)
            speeds = SiteSpeeds(link, link, own_bytes_s=1e5, lender_bytes_s=1.0, layers=2, row_bytes=1)
            self.overflow.homecoming = Homecoming(self.kv, lambda stage, site: speeds, (PAGE, 2 * PAGE))

    def act(self) -> None:
        (name,) = self.rng.choices(list(self.ACTIONS), list(self.ACTIONS.values()))
        getattr(self, name)()
        self.check()

    # -- sequences

    def start(self) -> None:
        if len(self.live) < 6:
            self.open([self.rng.randint(0, 1) for _ in range(self.rng.randint(1, 24))])

    def fork(self) -> None:
        """As siblings do: what was computed last is computed again."""
        ready = [seq_id for seq_id, live in self.live.items() if live.computed > 1 and not live.in_flight]
        if ready and len(self.live) < 6:
            parent = self.rng.choice(ready)
            count, self.last_seq = self.live[parent].computed - 1, self.last_seq + 1
            self.kv.fork(parent, self.last_seq, count)
            tokens = [*self.live[parent].tokens[: count + 1], 2, *range(self.rng.randint(0, 6))]
            self.live[self.last_seq] = Live(tokens, count, count)

    def end(self) -> None:
        ready = [seq_id for seq_id, live in self.live.items() if not live.in_flight]
        if ready:
            self.close(self.rng.choice(ready))

    def forget(self) -> None:
        self.kv.forget_cached()

    # -- steps

    def compute(self) -> None:
        if len(self.flying) >= self.depth or (self.kv.wants_stop and self.flying):
            self.finish()
        elif self.kv.wants_stop:
            self.take()
        else:
            self.take(self.choose())

    def choose(self) -> list[Item]:
        chosen = [seq_id for seq_id in self.live if self.rng.random() < 0.8]
        left = {seq_id: len(self.live[seq_id].tokens) - self.live[seq_id].scheduled for seq_id in chosen}
        items = [self.extend(seq_id, self.rng.randint(0, left[seq_id])) for seq_id in chosen]
        return [item for item in items if item is not None]

    def land_one(self) -> None:
        if self.flying:
            self.finish()

    def look(self) -> None:
        self.tick(self.rng.randint(0, 4))

    def wait(self) -> None:
        self.clock.now_s += self.rng.choice((0.0, STEP_S, STEP_S, 0.3, 3.0, 12.0))

    # -- lenders

    def use_devices(self) -> None:
        name = self.rng.choice(list(self.use))
        total = self.pool.budget(name).total_bytes
        own, external = (int(self.rng.choice((0, 0, 0.2, 0.5, 0.6)) * total) for _ in range(2))
        self.uses(name, own, external)

    def reclaim(self) -> None:
        lender = self.rng.choice([lease.lender for lease in self.leases()] or list(self.use))
        nbytes = self.rng.randint(1, max(1, self.lent(lender)))
        self.reclaims += self.pool.request_reclaim(lender, nbytes, self.rng.choice(list(Urgency))) > 0

    def withdraw(self) -> None:
        name = self.rng.choice(list(self.use))
        if self.rng.random() < 0.3:
            self.reclaims += self.pool.request_reclaim(name, None, self.rng.choice(list(Urgency))) > 0
        else:
            self.pool.reopen(name)

    def refuse(self) -> None:
        self.store.refusing = {name for name in self.use if self.rng.random() < 0.2}

    # -- the end

    def all_back(self) -> None:
        """Everybody wants everything: it is there in time, and nothing is lost that is still in use."""
        urgency = self.rng.choice(list(Urgency))
        for name in self.use:
            self.pool.request_reclaim(name, None, urgency)
        asked_s, computed, self.rounds_left = self.clock.now_s, self.computed_steps, 200
        while self.leases():
            self.round()
            assert self.clock.now_s <= asked_s + urgency.bound_s or not self.leases() or urgency is Urgency.CRITICAL
            assert self.computed_steps == computed or not self.leases() or urgency is not Urgency.CRITICAL
        self.land()
        self.check_contents()
        while self.live:
            self.close(next(iter(self.live)))
        assert self.extend(self.open([3, 3, 3]), 3) is not None, "what is left serves"


def run_chaos(seed: int, actions: int = 120) -> Chaos:
    world = Chaos(Random(seed))
    for _ in range(actions):
        world.act()
    world.all_back()
    return world
