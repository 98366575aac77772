"""The memory behind the KV blocks of one loaded model: how many there are, what stages borrow, and from whom."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from core.batching.running import RunningSequences
from core.config import Settings
from core.costs import Batch
from core.costs.cost import pipeline_s
from core.costs.profile import DATASHEET_LINK
from core.devices import HOST, Device, DeviceBudget, parse_link
from core.devices.probe import free_bytes_of
from core.engine.model_plan import ModelPlan
from core.engine.stages import EngineStage
from core.kv_cache.manager import KVCacheManager
from core.kv_cache.paged_kv_cache import PagedKVCache
from core.kv_cache.stage_pages import StagePages
from core.lending import GPUBudget, SiteSpeeds, VRAMLendingPool
from core.lending.homecoming import Homecoming
from core.lending.overflow import DeviceUse, KVOverflow
from core.placement.engine import stage_costs
from core.streaming.stream import StreamManager
from core.tiers import BlockLayout, HierarchicalMemory, Tier, open_memory, worth_restoring
from core.tiers.host_tier import HostTier
from core.tiers.kv_tiers import KVTiers, StepBlocks

_HOST_SHARE = 4


def check_promises(plan: ModelPlan, settings: Settings, host: DeviceBudget) -> None:
    """Raise `OutOfDeviceMemoryError` unless main memory has what the settings give to KV, beside layers that stream."""
    needed = (
        (StreamManager.HOST_PURPOSE, plan.placement.streamed_bytes),
        (HostTier.PURPOSE, settings.memory.host_bytes or 0),
        (PagedKVCache.LENT, settings.lending.host_bytes or 0),
    )
    tried = DeviceBudget(host.device, within=host)
    try:
        for purpose, nbytes in needed:
            tried.reserve(purpose, nbytes)
    finally:
        for purpose in tried.used_by_purpose():
            tried.release(purpose)


@dataclass(slots=True)
class KVMemory:
    """Blocks and what is behind them. `overflow` is there if some stage has to borrow, `tiers` if blocks are kept below
    the devices."""

    kv: KVCacheManager
    salt: bytes
    overflow: KVOverflow | None = None
    tiers: KVTiers | None = None

    def close(self) -> None:
        """The engine has ended and the stages' pages are free."""
        if self.overflow is not None:
            self.overflow.close()
        if self.tiers is not None:
            self.tiers.close()
        self.kv.disconnect()


def open_kv(
    plan: ModelPlan, settings: Settings, stages: Sequence[EngineStage], budgets: Mapping[str, DeviceBudget],
    salt: bytes, blocks: StepBlocks, running: RunningSequences,
) -> KVMemory:  # fmt: skip
    """The blocks of a model whose stages have allocated their local pages, and find in `blocks` what tiers keep.
    `budgets` has main memory's too; `running` is the list that the scheduler will keep."""
    block_size = settings.engine.block_size
    num_blocks = plan.pooled.tokens // block_size
    mapped = [
        None if stage.kv is None or stage.kv.num_pages >= num_blocks
        else StagePages(num_blocks, stage.kv.num_pages, stage.device.name)
        for stage in stages
    ]  # fmt: skip
    opened: list[KVTiers | KVOverflow] = []

    def tiers(kv: KVCacheManager) -> KVTiers | None:
        made = _open_tiers(plan, settings, kv, budgets[HOST], blocks)
        opened.extend([made] if made is not None else [])
        return made

    def lender(kv: KVCacheManager) -> KVOverflow | None:
        return None if kv.pages.is_trivial else _open_overflow(plan, settings, stages, budgets, kv)

    try:
        kv = KVCacheManager(
            num_blocks, block_size, salt=salt, enable_prefix_caching=settings.engine.enable_prefix_caching,
            stages=mapped, running=running, tiers=tiers, lender=lender,
        )  # fmt: skip
    except BaseException:
        for each in opened:
            each.close()
        raise
    assert kv.tiers is None or isinstance(kv.tiers, KVTiers)
    assert kv.lender is None or isinstance(kv.lender, KVOverflow)
    return KVMemory(kv, salt, kv.lender, kv.tiers)


def _open_overflow(
    plan: ModelPlan, settings: Settings, stages: Sequence[EngineStage], budgets: Mapping[str, DeviceBudget],
    kv: KVCacheManager,
) -> KVOverflow:  # fmt: skip
    watch = DeviceWatch(plan.devices, stages, budgets)
    lending = VRAMLendingPool(
        _lenders(plan, settings, budgets),
        plan.problem.links,
        lend_ratio=settings.lending.lend_ratio,
        reclaim_threshold=settings.lending.reclaim_threshold,
        clock=time.monotonic,
    )
    page_bytes = tuple(stage.kv.page_bytes if stage.kv is not None else 0 for stage in stages)
    homecoming = Homecoming(kv, site_speeds(plan, stages), page_bytes) if plan.is_measured else None
    return KVOverflow(
        kv,
        lending,
        Regions(stages, budgets),
        page_bytes,
        extent_blocks=settings.lending.extent_blocks,
        observe=watch.observe,
        homecoming=homecoming,
    )


def _open_tiers(
    plan: ModelPlan, settings: Settings, kv: KVCacheManager, host: DeviceBudget, blocks: StepBlocks
) -> KVTiers | None:
    """What is kept below the devices, without the places that outlast the process. Where the devices are main memory
    themselves, only if it is asked for."""
    asked, architecture = settings.memory, plan.architecture
    has_cards = not all(device.is_main_memory for device in plan.devices)
    wanted = asked.host_bytes is not None or asked.disk_path is not None or asked.remote_url is not None
    if not settings.engine.enable_prefix_caching or not (has_cards or wanted):
        return None
    if not all(plan.devices[stage.device_index].is_here for stage in plan.placement.stages):
        return None  # pages of workers do not come here yet
    shapes = [(shape.num_kv_heads, shape.key_dim, shape.value_dim) for shape in architecture.kv_shapes]
    layout = BlockLayout.of(shapes, kv.block_size, str(architecture.dtype).removeprefix("torch."))
    pin = any(device.is_gpu for device in plan.devices)
    memory = open_memory(asked, layout, host, pin=pin)
    if memory is None:
        return None
    return KVTiers(kv, memory, RestoreRule(plan, settings, kv, memory), blocks)


_HOST_BYTES_S = 40e9
"""At which main memory is read where it lends to a GPU: two channels of DDR4."""


def site_speeds(plan: ModelPlan, stages: Sequence[EngineStage]) -> Callable[[int, str], SiteSpeeds]:
    """What is known of a stage and a device that lends to it: links and bandwidths as they were measured. Main memory
    is taken to be behind the slowest link that was."""
    links = plan.problem.links
    slowest = min(links.links.values(), key=lambda link: link.bandwidth_bytes_s, default=DATASHEET_LINK)
    rates = {device.name: device.profile.kv_bytes_s for device in plan.problem.devices}
    placed = [(stage.device.name, len(stage.kv.layer_bytes) if stage.kv is not None else 0) for stage in stages]

    def between(stage: int, lender: str) -> SiteSpeeds:
        own, layers = placed[stage]
        out, home = links.link(own, lender), links.link(lender, own)
        if lender == HOST and (lender, own) not in links.links:
            out = home = slowest
        lender_bytes_s = rates.get(lender, _HOST_BYTES_S)
        return SiteSpeeds(out, home, rates[own], lender_bytes_s, layers, plan.problem.costs.hidden_bytes)

    return between


_CHUNK_TOKENS = 256
_UNMEASURED_TOKEN_S = 1e-3
"""Seconds to compute a token of a prompt, until the first prompt has been measured."""


class RestoreRule:
    """How much of a prefix to restore: what saves time, by the measured speeds of tiers and links."""

    def __init__(self, plan: ModelPlan, settings: Settings, kv: KVCacheManager, memory: HierarchicalMemory) -> None:
        self._kv = kv
        self._memory = memory
        link = settings.devices.sim_link
        emulated = parse_link(link) if link and any(device.is_emulated for device in plan.devices) else None
        host = memory.stats().tiers[0].speed
        measured = host.read_bytes_s if host is not None else float("inf")
        self._link_bytes_s = emulated.bandwidth_bytes_s if emulated is not None else measured
        self._link_latency_s = emulated.latency_s * plan.costs.num_layers if emulated is not None else 0.0
        self._plan = plan

    def __call__(self, known: int, tiers: Sequence[Tier]) -> int:
        return worth_restoring(
            tiers,
            self._memory.layout.nbytes,
            self._memory.speeds(),
            link_bytes_s=self._link_bytes_s,
            link_latency_s=self._link_latency_s,
            block_recompute_s=self._blocks_s(known, len(tiers)),
        )

    def _blocks_s(self, known: int, count: int) -> list[float]:
        """Predicted seconds to compute each of `count` blocks behind `known` ones. Attention grows evenly with the
        context: both ends tell."""
        size = self._kv.block_size
        first_s, last_s = (self._token_s(number * size) * size for number in (known, known + count - 1))
        return [first_s + (last_s - first_s) * i / max(1, count - 1) for i in range(count)]

    def _token_s(self, context: int) -> float:
        """Predicted seconds per token of a prompt behind `context` tokens."""
        if not self._plan.is_measured:
            return self._kv.running.prefill_token_s or _UNMEASURED_TOKEN_S
        stages = stage_costs(self._plan.placement, self._plan.problem)
        batch = Batch(_CHUNK_TOKENS, context + _CHUNK_TOKENS, 0)
        compute, hops = pipeline_s(self._plan.costs, stages, self._plan.problem.links, batch)
        return (sum(compute) + sum(hops)) / _CHUNK_TOKENS


def _lenders(plan: ModelPlan, settings: Settings, budgets: Mapping[str, DeviceBudget]) -> list[GPUBudget]:
    """Every device that has memory, and main memory: as much of it as is set, or a quarter of what is free there.

    A stage's own pages are part of the pool as much as what it lends, so they are no need of its own: they are taken
    off what may be allocated.
    """
    found = []
    for device in plan.devices:
        pages = budgets[device.name].used_by_purpose().get(PagedKVCache.PURPOSE, 0)
        limit = device.memory_limit_bytes
        if limit > 0:
            found.append(GPUBudget(device.name, limit - pages, limit))
    lent = settings.lending.host_bytes
    lent = budgets[HOST].free_bytes // _HOST_SHARE if lent is None else lent
    if lent > 0:
        found.append(GPUBudget(HOST, lent, lent, last_resort=True))
    return found


class Regions:
    """Allocates regions on the devices that lend them."""

    def __init__(self, stages: Sequence[EngineStage], budgets: Mapping[str, DeviceBudget]) -> None:
        self._stages = stages
        self._budgets = budgets

    def add(self, stage: int, region_id: int, device: str, pages: int) -> None:
        """Raises `OutOfDeviceMemoryError`, with nothing kept."""
        budget = self._budgets[device]
        self._cache(stage).add_region(region_id, pages, budget.device, budget)

    def drop(self, stage: int, region_id: int) -> None:
        """Give a region's memory back to the device, and what the allocator keeps of it to other programs."""
        kv = self._cache(stage)
        where = torch.device(kv.region(region_id).device.torch_device)
        kv.drop_region(region_id)
        if where.type == "cuda":
            torch.cuda.empty_cache()

    def _cache(self, stage: int) -> PagedKVCache:
        kv = self._stages[stage].kv
        assert isinstance(kv, PagedKVCache)  # stages on workers do not borrow
        return kv


PRESSED_BYTES = 256 << 20
_PRESSED_SHARE = 50
"""Once other programs have taken more of a card than they had, so much of it (a fiftieth of a small one) is kept free
for them: what is lent there goes back bit by bit, until they no longer take it."""


class DeviceWatch:
    """What the devices are used for now. Made when the stages have been loaded."""

    def __init__(
        self, devices: Sequence[Device], stages: Sequence[EngineStage], budgets: Mapping[str, DeviceBudget]
    ) -> None:
        self._stages = {stage.device.name: stage for stage in stages}
        self._budgets = budgets
        self._started_s = time.monotonic()
        self._cards: dict[str, list[Device]] = {}
        for device in devices:
            self._cards.setdefault(device.torch_device, []).append(device)
        self._left_before = {card: self._left_by_others(card, free) for card, free in self._read().items()}

    def _read(self) -> dict[str, int]:
        """Free bytes by card."""
        return {card: free_bytes_of(parts[0]) for card, parts in self._cards.items()}

    def _left_by_others(self, card: str, free_bytes: int) -> int:
        """What is free or ours."""
        return free_bytes + sum(self._budgets[device.name].used_bytes for device in self._cards[card])

    def observe(self) -> Iterable[DeviceUse]:
        """One entry per device. What is missing of a card's free memory is charged to its parts by what each may use,
        lent memory included."""
        for card, free in self._read().items():
            parts = self._cards[card]
            kept = min(PRESSED_BYTES, sum(device.memory_limit_bytes for device in parts) // _PRESSED_SHARE)
            if self._left_by_others(card, free) < self._left_before[card] - kept:  # they have taken more
                free -= kept
            budgets = [self._budgets[device.name] for device in parts]
            lent = [budget.used_by_purpose().get(PagedKVCache.LENT, 0) for budget in budgets]
            shares = [budget.free_bytes + nbytes for budget, nbytes in zip(budgets, lent, strict=True)]
            missing = max(0, sum(budget.free_bytes for budget in budgets) - free)
            for device, budget, nbytes, share in zip(parts, budgets, lent, shares, strict=True):
                used = sum(budget.used_by_purpose().values())
                own = used - budget.used_by_purpose().get(PagedKVCache.PURPOSE, 0) - nbytes
                external = missing * share // max(1, sum(shares))
                stage = self._stages.get(device.name)
                last_used_s = self._started_s if stage is None else stage.last_used_s
                yield DeviceUse(device.name, own, external, max(0.0, time.monotonic() - last_used_s))
