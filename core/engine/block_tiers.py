"""What of a loaded model's KV is kept below its devices: in main memory of all machines that compute it, in memory that
other machines offer, and, by what is measured, which of it is worth bringing back."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

from core.cluster.lent_memory import LentMemories, LentMemory, LentMemoryEvents
from core.cluster.master import Master
from core.cluster.placed_stage import PlacedRemoteStage
from core.cluster.remote_parts import PlacedParts, StageBytes, common_slots
from core.config import MemorySettings, Settings
from core.costs import Batch
from core.costs.cost import pipeline_s
from core.devices import DeviceBudget, parse_link
from core.engine.model_plan import ModelPlan
from core.engine.stages import EngineStage
from core.kv_cache.manager import KVCacheManager
from core.logs import get_logger
from core.placement.engine import stage_costs
from core.tiers import BlockLayout, HierarchicalMemory, Tier, open_memory, worth_restoring
from core.tiers.kv_tiers import KVTiers, StepBlocks
from core.tiers.opening import host_share, make_identity, open_lasting, open_peer
from core.tiers.parts import BlockParts
from core.tiers.records import TierSpeed

logger = get_logger(__name__)


NETWORK_SHARE = 0.5
"""Of a network's rate, for blocks that are written while serving."""


class BlockTiers:
    """`tiers` is there if blocks are kept below the devices; `missing` says why a tier that was asked for is not."""

    def __init__(self) -> None:
        self.tiers: KVTiers | None = None
        self.missing: dict[Tier, str] = {}
        self._rule: RestoreRule | None = None
        self._lent: LentMemory | None = None

    def open(
        self, plan: ModelPlan, settings: Settings, kv: KVCacheManager, host: DeviceBudget, blocks: StepBlocks,
        stages: Sequence[EngineStage], cluster: Master | None,
    ) -> None:  # fmt: skip
        """Without the places that outlast the process. Where the devices are main memory themselves, only if it is
        asked for; where the `stages` are on several machines, only if all of them have memory for their parts."""
        asked, architecture = settings.memory, plan.architecture
        has_cards = not all(device.is_main_memory for device in plan.devices)
        wanted = asked.host_bytes is not None or asked.disk_path is not None or asked.remote_url is not None
        if not settings.engine.enable_prefix_caching or not (has_cards or wanted) or asked.host_bytes == 0:
            return
        shapes = [(shape.num_kv_heads, shape.key_dim, shape.value_dim) for shape in architecture.kv_shapes]
        layout = BlockLayout.of(shapes, kv.block_size, str(architecture.dtype).removeprefix("torch."))
        here, elsewhere = divided(plan, kv.block_size, stages)
        share = host_share(asked, _size(here), host)
        asked = asked.model_copy(update={"host_bytes": share})
        parts, remote = BlockParts(layout.nbytes, here), None
        if elsewhere:
            assert cluster is not None
            count, least = common_slots(elsewhere)
            if count < 1:
                reason = f"{least} keeps no blocks (memory.host_bytes there)"
                logger.info("no main memory for KV blocks", reason=reason)
                self.missing = {Tier.L3: reason} if wanted else {}
                return
            count = min(count, share // _size(here) if here else count)
            if count < 1:
                return
            remote = PlacedParts(cluster, elsewhere, count)
            parts = BlockParts(layout.nbytes, here, remote)
        try:
            memory = open_memory(asked, layout, host, pin=any(device.is_gpu for device in plan.devices), parts=parts)
        except BaseException:
            parts.close()
            raise
        if memory is None:
            parts.close()
            return
        self._rule = RestoreRule(plan, settings, kv, memory, remote)
        if remote is not None:
            memory.limit_writes(remote.slowest_bytes_s * NETWORK_SHARE)
        self.tiers = KVTiers(kv, memory, self._rule, blocks)

    def open_lasting(self, settings: MemorySettings, salt: bytes, lent: LentMemories | None) -> None:
        """Also use what outlasts the engine, once no other one has it: what machines of the cluster offer, now and when
        they join, and what outlasts the process."""
        if self.tiers is None:
            if lent is not None:
                lent.give_up()
            return
        if lent is not None:
            self._borrow(lent, settings, salt)
        open_lasting(self.tiers.memory, settings, salt)

    def _borrow(self, lent: LentMemories, settings: MemorySettings, salt: bytes) -> None:
        assert self.tiers is not None and self._rule is not None
        memory = self.tiers.memory
        place = self._lent = lent.take(make_identity(memory.layout, salt, settings))

        def found(speed: TierSpeed, network_bytes_s: float) -> None:
            memory.add_below([open_peer(settings, memory.layout, place, speed, place.kept)])
            memory.limit_writes(network_bytes_s * NETWORK_SHARE)

        def gone(blocks: Collection[bytes]) -> None:
            memory.forget(Tier.L4, blocks)

        place.open(LentMemoryEvents(found, gone, self._rule.is_worth))

    def troubles(self) -> dict[Tier, str]:
        """Tiers that were asked for and are missing, or take no blocks at the moment, and why."""
        return self.missing | (self.tiers.memory.troubles() if self.tiers is not None else {})

    def close(self) -> None:
        """Safe to call twice."""
        if self._lent is not None:
            self._lent.close()
        if self.tiers is not None:
            self.tiers.close()


def divided(plan: ModelPlan, block_size: int, stages: Sequence[EngineStage]) -> tuple[list[slice], list[StageBytes]]:
    """Where the layers of the stages here, and those of stages on other machines, are in a block's bytes."""
    element = plan.architecture.dtype.itemsize
    layers = [shape.bytes_per_token(element) * block_size for shape in plan.architecture.kv_shapes]
    starts = list(itertools.accumulate(layers, initial=0))
    here: list[slice] = []
    elsewhere: list[StageBytes] = []
    for stage in stages:
        at = slice(starts[stage.part.first], starts[stage.part.last])
        if isinstance(stage, PlacedRemoteStage):
            elsewhere.append(StageBytes(stage, at))
        else:
            here.append(at)
    return here, elsewhere


def _size(slices: Sequence[slice]) -> int:
    return sum(each.stop - each.start for each in slices)


_CHUNK_TOKENS = 256
_UNMEASURED_TOKEN_S = 1e-3
"""Seconds to compute a token of a prompt, until the first prompt has been measured."""


class RestoreRule:
    """How much of a prefix to restore: what saves time, by the measured speeds of tiers and links. `parts` that other
    machines keep cross the network when their block comes from below main memory."""

    def __init__(
        self, plan: ModelPlan, settings: Settings, kv: KVCacheManager, memory: HierarchicalMemory,
        parts: PlacedParts | None = None,
    ) -> None:  # fmt: skip
        self._parts = parts
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
            {tier: self._with_parts(speed) for tier, speed in self._memory.speeds().items()},
            link_bytes_s=self._link_bytes_s,
            link_latency_s=self._link_latency_s,
            block_recompute_s=self._blocks_s(known, len(tiers)),
        )

    def is_worth(self, speed: TierSpeed) -> bool:
        """Whether a tier is so fast that a block of it is sooner read than computed, in a context of usual length."""
        nbytes, usual = self._memory.layout.nbytes, self._plan.problem.context // self._kv.block_size
        read_s = self._with_parts(speed).fetch_s(nbytes) + self._link_latency_s + nbytes / self._link_bytes_s
        return read_s < self._blocks_s(usual, 1)[0]

    def _with_parts(self, speed: TierSpeed) -> TierSpeed:
        """What a tier does where parts of its blocks are then sent on."""
        if self._parts is None:
            return speed
        sent = self._parts.nbytes / self._memory.layout.nbytes / self._parts.slowest_bytes_s
        return TierSpeed(
            1.0 / (1.0 / speed.read_bytes_s + sent), speed.write_bytes_s, speed.latency_s + self._parts.latency_s
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
