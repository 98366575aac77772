"""Builds an engine, stage by stage, so that the one it is to replace may serve on meanwhile."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from core.batching.batcher import ContinuousBatcher
from core.batching.intake import CircuitBreaker
from core.batching.running import RunningSequences
from core.batching.scheduler import Scheduler
from core.batching.step import SchedulerLimits
from core.cluster.far_regions import LenderHere
from core.cluster.lent_memory import LentMemories
from core.cluster.placed_stage import RemoteStages, StageOrder, connect_stages
from core.config import Settings
from core.config_schema import EngineSettings
from core.costs import SLOTS
from core.devices import HOST, Device, DeviceBudget, MainMemory, format_bytes, host_of
from core.devices.probe import free_bytes_of
from core.emulation import EmulatedStage, GuestTime
from core.engine.kv_memory import check_promises, open_kv
from core.engine.model_engine import ModelEngine, describe, grammars_of, products_are_native
from core.engine.model_plan import ModelPlan, cohort_policy, lends, stage_timer
from core.engine.stages import EngineStage
from core.errors import InsufficientMemoryError
from core.execution.attention.select import AttentionBackends, LinearAdapter
from core.execution.attention.warm_up import warm_up_attention
from core.execution.known_sequences import KnownSequences
from core.execution.model_runner import ModelRunner
from core.execution.stage import KVSetup, Stage
from core.execution.step_times import StepTimes
from core.execution.threads import CpuThreads
from core.kv_cache.block_table import RopeBorder
from core.kv_cache.manager import KVCacheManager
from core.models.checkpoint import weights_digest
from core.models.shared_parts import SharedParts
from core.models.stage_model import StageSlice
from core.models.tokenizer import Tokenizer
from core.streaming.stream import StreamedLayers
from core.tiers.kv_tiers import StepBlocks
from core.transfer import TransferManager

PREVIOUS = "previous placement"
"""What an engine that is about to go still has on a device, in the ledger of the one that comes."""


def check_memory(plan: ModelPlan, present: Mapping[str, int] | None = None) -> None:
    """Raise `InsufficientMemoryError` if the devices no longer have the memory that the plan counts on, because
    something else took it since. `present`: bytes by device that are there already, or will be free again."""
    needed: dict[str, int] = defaultdict(int)
    for stage, local_tokens in zip(plan.placement.stages, plan.pooled.local_tokens, strict=True):
        device = plan.devices[stage.device_index]
        if not device.is_here:
            continue  # the node that has it looks for itself
        kv_bytes = stage.kv_bytes_per_token * local_tokens
        needed[device.torch_device] += stage.weight_bytes + kv_bytes + stage.workspace_bytes
        needed[device.torch_device] -= (present or {}).get(device.name, 0)
    devices = tuple(device for device in plan.devices if device.is_here)
    if plan.host is not None:
        devices = (*devices, plan.host)
        needed[plan.host.torch_device] += plan.placement.streamed_by_host()[HOST]
    free = {device.torch_device: free_bytes_of(device) for device in devices}
    lacking = {name: nbytes - free[name] for name, nbytes in needed.items() if nbytes > free[name]}
    if lacking:
        listed = ", ".join(
            f"{name} has {format_bytes(free[name])} free, {format_bytes(nbytes)} too few"
            for name, nbytes in lacking.items()
        )
        raise InsufficientMemoryError(
            f"Since the placement was planned, other programs have taken memory: {listed}. Free it, or give less with "
            "--devices.",
            lacking_bytes=lacking,
        )


class EngineBuilder:
    """`load`, or `load_stage` each stage, in any order, then `finish`; on failure `free`. `tokenizer` is read if not
    given; `stages` are those that have been loaded, by number; `nodes` loads those of other machines, and `lent` is
    memory there."""

    def __init__(
        self, plan: ModelPlan, settings: Settings, *, transfer: TransferManager, main_memory: MainMemory,
        cpu_threads: int, on_read: Callable[[int], None], tokenizer: Tokenizer | None = None,
        nodes: RemoteStages | None = None, lent: LentMemories | None = None,
    ) -> None:  # fmt: skip
        self.plan = plan
        self._lent = lent
        self._settings = settings
        self._nodes = nodes
        self._transfer = transfer
        self._main_memory = main_memory
        self._on_read = on_read
        self._started_s = time.perf_counter()
        if tokenizer is None:
            template = settings.model.chat_template
            source = None if template is None else template.read_text(encoding="utf-8")
            markup = settings.model.markup_in_messages
            tokenizer = Tokenizer.from_directory(plan.resolved.path, source, markup_in_messages=markup)
        self._tokenizer = tokenizer
        self._host = main_memory.open(plan.devices)
        self.budgets = {device.name: DeviceBudget(device) for device in (*plan.devices, *plan.node_hosts)}
        self.budgets[HOST] = self._host
        used = [plan.devices[stage.device_index] for stage in plan.placement.stages]
        self._threads = CpuThreads(cpu_threads, _on_cpu(used, ""))
        self.backends = AttentionBackends(settings, partial(getattr, self._threads, "current"))
        self._blocks = StepBlocks()
        self._grammars = grammars_of(plan, tokenizer)
        self._guest_time = GuestTime()
        known = KnownSequences()  # what this process knows of sequences is shared
        self._make_stage: Callable[..., Stage] = partial(Stage, known=known)
        if any(device.is_emulated for device in plan.devices):  # all keep to what those take of each other's time
            self._make_stage = partial(EmulatedStage, known=known, guests=self._guest_time)
        self.stages: dict[int, EngineStage] = {}

    def slice_of(self, index: int) -> StageSlice:
        stage = self.plan.placement.stages[index]
        return StageSlice(stage.first_layer, stage.last_layer, self.plan.architecture.num_layers)

    def resident_of(self, index: int) -> StageSlice:
        """The same, without layers that stream in: they move, so no stage that still computes may have them too."""
        return replace(self.slice_of(index), without=frozenset(self.plan.placement.stages[index].streamed_layers))

    def device_of(self, index: int) -> Device:
        return self.plan.devices[self.plan.placement.stages[index].device_index]

    def load_stage(self, index: int, parts: SharedParts | None = None) -> None:
        """Read a stage's weights, but for `parts`."""
        plan, device = self.plan.placement.stages[index], self.device_of(index)
        if not device.is_here:
            assert self._nodes is not None
            budget, host = self.budgets[device.name], self.budgets[host_of(device.name)]
            self.stages[index] = self._nodes.load(self._order(index), budget, host)
            return
        budget, timer = self.budgets[device.name], stage_timer(self.plan, plan)
        stage = self._make_stage(self.plan.architecture, self.slice_of(index), device, budget, timer)
        if self._settings.tracing.enabled:
            stage.times = StepTimes()
        if self._grammars is not None:
            stage.keep_to(self._grammars)
        self.stages[index] = stage
        streamed = None
        if plan.streamed_layers:
            sizes = (plan.streamed_layers, plan.streamed_bytes, plan.slot_bytes)
            streamed = StreamedLayers(*sizes, self._host, self._transfer)
        resident = plan.weight_bytes - SLOTS * plan.slot_bytes
        stage.load(self.plan.resolved.path, resident, self._on_read, self.adapter_of(index), streamed, parts)

    def _order(self, index: int) -> StageOrder:
        """A stage on another machine, and what is around it here."""
        plan, device, placed = self.plan, self.device_of(index), self.plan.placement.stages
        before = self.device_of(index - 1) if index else None
        fed_here = before is not None and before.is_here
        assert self._nodes is not None
        entrance = self._host.device
        if before is not None and fed_here and (before.computes_on_cpu or self._nodes.takes_from(before, device)):
            entrance = before
        used = [plan.devices[stage.device_index] for stage in placed]
        costs, profile, link = None, None, None
        if device.is_emulated:
            costs, profile = plan.costs, plan.problem.devices[device.index].profile
            link = plan.problem.links.link(host_of(device.name), device.name)
        lenders = plan.devices if lends(plan, self._settings) else ()
        return StageOrder(
            device, placed[index], entrance, fed_here,
            tells_here=index + 1 == len(placed) or self.device_of(index + 1).is_here,
            together=_on_cpu(used, device.node), costs=costs, profile=profile,
            vocabulary=self._grammars.vocabulary if self._grammars and index + 1 == len(placed) else None,
            host_link=link, lenders=tuple(lender for lender in lenders if lender.node == device.node),
        )  # fmt: skip

    def load(self) -> ModelEngine:
        """All stages, then `finish`. On failure everything allocated so far is freed.

        Raises, before anything is allocated, `OutOfDeviceMemoryError` if main memory does not have what the settings
        give to KV.
        """
        try:
            check_promises(self.plan, self._settings, self._host)
            for index in range(len(self.plan.placement.stages)):
                self.load_stage(index)
            return self.finish()
        except BaseException:
            self.free()
            raise

    def adapter_of(self, index: int) -> LinearAdapter | None:
        """What replaces modules of a stage by faster ones."""
        return self.backends.of(self.device_of(index))[1]

    def hold_previous(self, device: str, nbytes: int) -> None:
        """Another engine has so many bytes on a device beside this one's, until `previous_gone`."""
        self.budgets[device].reserve(PREVIOUS, nbytes)

    def previous_gone(self) -> None:
        """Nothing else is on the devices any more."""
        for budget in self.budgets.values():
            budget.release(PREVIOUS)

    def finish(self) -> ModelEngine:
        """Give all stages their pages and start the batcher, without the tiers that outlast the process."""
        plan, settings = self.plan, self._settings
        check_promises(plan, settings, self._host)
        stages = [self.stages[index] for index in range(len(plan.placement.stages))]
        size, most = settings.engine.block_size, min(plan.max_model_len, plan.pooled.tokens)
        placed = [self.slice_of(index) for index in range(len(stages)) if not self.device_of(index).is_here]
        elsewhere = frozenset(layer for part in placed for layer in range(part.first, part.last))
        width = -(-most // size) + 1
        setup = KVSetup(size, width, self.backends, self._transfer, self._host.device, self._blocks, elsewhere)
        names = []
        for stage, planned, tokens in zip(stages, plan.placement.stages, plan.pooled.local_tokens, strict=True):
            self.budgets[stage.device.name].reserve("workspace", planned.workspace_bytes)
            stage.allocate_kv(tokens // size, setup)
            names.append(self.backends(stage.device).name if isinstance(stage, Stage) else stage.attention)
        lenders = [device for device in plan.devices if device.is_here] if lends(plan, settings) else ()
        here = [stage for stage in stages if isinstance(stage, Stage)]
        warm_up_attention([(stage.device, stage.attention_kinds()) for stage in here], lenders, self.backends)
        connect_stages(stages)
        return self._assemble(stages, tuple(names))

    def _assemble(self, stages: list[EngineStage], backends: tuple[str, ...]) -> ModelEngine:
        plan, settings = self.plan, self._settings
        engine, model = settings.engine, describe(plan, settings, self._tokenizer)
        weights = plan.resolved.revision or weights_digest(model.path)
        quantized = plan.architecture.quantization
        salt = f"{model.path}:{weights}:{model.dtype}{f':{quantized.key}' if quantized else ''}".encode()
        running = RunningSequences()
        cluster = self._nodes.master if self._nodes is not None else None
        here = LenderHere(self.backends, self._transfer, self._guest_time.pace)
        memory = open_kv(plan, settings, stages, self.budgets, salt, self._blocks, running, cluster, here)
        try:
            torch_threads = 1 if products_are_native(backends, plan, settings) else self._threads.together
            timed = settings.tracing.enabled
            runner = ModelRunner(stages, self._transfer, self._threads, torch_threads, timed)
            batcher = ContinuousBatcher(
                runner,
                Scheduler(memory.kv, _limits(engine, memory.kv, model.max_model_len, plan.architecture.rope), running),
                self._tokenizer,
                max_queue=engine.max_queue,
                max_queued_tokens=max(engine.max_queued_tokens, model.max_model_len),
                breaker=CircuitBreaker(engine.breaker_failures, engine.breaker_reset_s),
                policy=cohort_policy(plan, settings),
            )
            batcher.start()
        except BaseException:
            memory.close()
            raise
        return ModelEngine(
            model, plan, settings, self.budgets, stages, self._transfer, self._main_memory, runner, memory, batcher,
            backends, self._lent, load_s=time.perf_counter() - self._started_s,
        )  # fmt: skip

    def free(self) -> None:
        """Give back what has been loaded."""
        for stage in self.stages.values():
            stage.free()
        self.stages.clear()
        self._main_memory.close(self._host)


def _on_cpu(devices: Sequence[Device], node: str) -> int:
    """How many of the devices compute on the processor of a node (empty: of this machine)."""
    return sum(device.computes_on_cpu for device in devices if device.node == node)


def _limits(engine: EngineSettings, kv: KVCacheManager, max_model_len: int, rope: RopeBorder | None) -> SchedulerLimits:
    """As set; where a stage has few pages of its own, no more than half of them for the blocks that sequences are
    in the middle of, and half for what a step writes."""
    half = kv.writable_blocks // 2
    batch, tokens = engine.max_batch_size, engine.max_num_batched_tokens
    if not kv.pages.is_trivial:
        batch, tokens = min(batch, half), min(tokens, half * engine.block_size)
    return SchedulerLimits(batch, tokens, min(tokens, engine.prefill_chunk_size or tokens), max_model_len, rope)
