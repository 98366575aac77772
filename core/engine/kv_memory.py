"""The memory behind the KV blocks of one loaded model: how many there are, what stages borrow, and from whom."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from core.batching.running import RunningSequences
from core.cluster.far_regions import FarRegions, LenderHere
from core.cluster.master import Master
from core.config import Settings
from core.costs.profile import DATASHEET_LINK
from core.devices import HOST, Device, DeviceBudget, host_of, machine_of
from core.devices.pressure import CardWatch
from core.engine.block_tiers import BlockTiers
from core.engine.model_plan import ModelPlan
from core.engine.regions import Regions
from core.engine.stages import EngineStage
from core.kv_cache.manager import KVCacheManager
from core.kv_cache.paged_kv_cache import PagedKVCache
from core.kv_cache.stage_pages import StagePages
from core.lending import GPUBudget, SiteSpeeds, VRAMLendingPool
from core.lending.homecoming import Homecoming
from core.lending.overflow import DeviceUse, KVOverflow
from core.streaming.stream import StreamManager
from core.tiers.host_tier import HostTier
from core.tiers.kv_tiers import KVTiers, StepBlocks

_HOST_SHARE = 4


def check_promises(plan: ModelPlan, settings: Settings, host: DeviceBudget) -> None:
    """Raise `OutOfDeviceMemoryError` unless main memory has what the settings give to KV, beside layers that stream."""
    needed = (
        (StreamManager.HOST_PURPOSE, plan.placement.streamed_by_host().get(HOST, 0)),
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
    """Blocks and what is behind them. `overflow` is there if some stage has to borrow, `below` has what is kept below
    the devices."""

    kv: KVCacheManager
    salt: bytes
    overflow: KVOverflow | None = None
    regions: Regions | None = None
    below: BlockTiers = field(default_factory=BlockTiers)

    @property
    def tiers(self) -> KVTiers | None:
        return self.below.tiers

    def close(self) -> None:
        """The engine has ended and the stages' pages are free."""
        if self.overflow is not None:
            self.overflow.close()
        if self.regions is not None:
            self.regions.close()
        self.below.close()
        self.kv.disconnect()


def open_kv(
    plan: ModelPlan, settings: Settings, stages: Sequence[EngineStage], budgets: Mapping[str, DeviceBudget],
    salt: bytes, blocks: StepBlocks, running: RunningSequences, cluster: Master | None = None,
    lender_here: LenderHere | None = None,
) -> KVMemory:  # fmt: skip
    """The blocks of a model whose stages have allocated their local pages, and find in `blocks` what tiers keep.
    `budgets` has main memory's too; `running` is the list that the scheduler will keep; machines of the `cluster` may
    have memory for blocks. With `lender_here` devices of this process attend for stages there."""
    block_size = settings.engine.block_size
    num_blocks = plan.pooled.tokens // block_size
    mapped = [
        None if stage.kv is None or stage.kv.num_pages >= num_blocks
        else StagePages(num_blocks, stage.kv.num_pages, stage.device.name)
        for stage in stages
    ]  # fmt: skip
    below = BlockTiers()

    def tiers(kv: KVCacheManager) -> KVTiers | None:
        below.open(plan, settings, kv, budgets[HOST], blocks, stages, cluster)
        return below.tiers

    far = None
    if cluster is not None and lender_here is not None and plan.pooled.far:
        far = FarRegions(cluster, plan.architecture, block_size, settings.engine.model_dump(mode="json"), lender_here)
        far.prepare(stages, plan.pooled.far, plan.devices)
    regions = Regions(stages, budgets, far)

    def lender(kv: KVCacheManager) -> KVOverflow | None:
        return None if kv.pages.is_trivial else _open_overflow(plan, settings, stages, budgets, kv, cluster, regions)

    try:
        kv = KVCacheManager(
            num_blocks, block_size, salt=salt, enable_prefix_caching=settings.engine.enable_prefix_caching,
            stages=mapped, running=running, tiers=tiers, lender=lender,
        )  # fmt: skip
    except BaseException:
        below.close()
        raise
    assert kv.lender is None or isinstance(kv.lender, KVOverflow)
    return KVMemory(kv, salt, kv.lender, regions, below)


def _open_overflow(
    plan: ModelPlan, settings: Settings, stages: Sequence[EngineStage], budgets: Mapping[str, DeviceBudget],
    kv: KVCacheManager, cluster: Master | None, regions: Regions,
) -> KVOverflow:  # fmt: skip
    watch = DeviceWatch(plan.devices, stages, budgets, cluster)
    lending = VRAMLendingPool(
        _lenders(plan, settings, budgets),
        plan.problem.links,
        lend_ratio=settings.lending.lend_ratio,
        reclaim_threshold=settings.lending.reclaim_threshold,
        clock=time.monotonic,
        far=plan.pooled.far,
    )
    page_bytes = tuple(stage.kv.page_bytes if stage.kv is not None else 0 for stage in stages)
    homecoming = Homecoming(kv, site_speeds(plan, stages), page_bytes) if plan.is_measured else None
    return KVOverflow(
        kv,
        lending,
        regions,
        page_bytes,
        extent_blocks=settings.lending.extent_blocks,
        observe=watch.observe,
        homecoming=homecoming,
    )


_HOST_BYTES_S = 40e9
"""At which main memory is read where it lends to a GPU: two channels of DDR4."""


def site_speeds(plan: ModelPlan, stages: Sequence[EngineStage]) -> Callable[[int, str], SiteSpeeds]:
    """What is known of a stage and a device that lends to it: links and bandwidths as they were measured. Main memory
    is taken to be behind the slowest link inside a machine that was."""
    links = plan.problem.links
    copies = [link for pair, link in links.links.items() if machine_of(pair[0]) == machine_of(pair[1]) == ""]
    slowest = min((*copies, *links.inside.values()), key=lambda link: link.bandwidth_bytes_s, default=DATASHEET_LINK)
    rates = {device.name: device.profile.kv_bytes_s for device in plan.problem.devices}
    placed = [(stage.device.name, len(stage.kv.layer_bytes) if stage.kv is not None else 0) for stage in stages]

    def between(stage: int, lender: str) -> SiteSpeeds:
        own, layers = placed[stage]
        out, home = links.copying(own, lender), links.copying(lender, own)
        if lender == host_of(own) and (lender, own) not in links.links:
            out = home = slowest
        lender_bytes_s = rates.get(lender, _HOST_BYTES_S)
        return SiteSpeeds(out, home, rates[own], lender_bytes_s, layers, plan.problem.costs.hidden_bytes)

    return between


def _lenders(plan: ModelPlan, settings: Settings, budgets: Mapping[str, DeviceBudget]) -> list[GPUBudget]:
    """Every device that has memory, and the main memory of each machine: as much of it as is set, or a quarter of what
    is free there.

    A stage's own pages are part of the pool as much as what it lends, so they are no need of its own: they are taken
    off what may be allocated.
    """
    found = []
    for device in plan.devices:
        pages = budgets[device.name].used_by_purpose().get(PagedKVCache.PURPOSE, 0)
        limit = device.memory_limit_bytes
        if limit > 0:
            found.append(GPUBudget(device.name, limit - pages, limit))
    for host in (HOST, *(host.name for host in plan.node_hosts)):
        free, asked = budgets[host].free_bytes, settings.lending.host_bytes
        lent = free // _HOST_SHARE if asked is None else asked if host == HOST else min(asked, free)
        if lent > 0:
            found.append(GPUBudget(host, lent, lent, last_resort=True))
    return found


class DeviceWatch:
    """What the devices are used for now; those of nodes as the nodes say. Made when the stages have been loaded."""

    def __init__(
        self, devices: Sequence[Device], stages: Sequence[EngineStage], budgets: Mapping[str, DeviceBudget],
        cluster: Master | None = None,
    ) -> None:  # fmt: skip
        self._devices = tuple(devices)
        self._stages = {stage.device.name: stage for stage in stages}
        self._budgets = budgets
        self._cluster = cluster
        self._started_s = time.monotonic()
        self._here = CardWatch([device for device in devices if device.is_here], budgets, PagedKVCache.LENT)

    def observe(self) -> Iterable[DeviceUse]:
        """One entry per device."""
        external = self._here.external_bytes()
        if self._cluster is not None:
            external |= self._cluster.external_bytes()
        for device in self._devices:
            by_purpose = self._budgets[device.name].used_by_purpose()
            pages = by_purpose.get(PagedKVCache.PURPOSE, 0) + by_purpose.get(PagedKVCache.LENT, 0)
            stage = self._stages.get(device.name)
            last_used_s = self._started_s if stage is None else stage.last_used_s
            yield DeviceUse(
                device.name, sum(by_purpose.values()) - pages, external.get(device.name, 0),
                max(0.0, time.monotonic() - last_used_s),
            )  # fmt: skip
