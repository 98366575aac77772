"""Which engine is served: loading one in place of another, moving it to other devices, letting it go."""

from __future__ import annotations

import gc
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from core.batching.publisher import RequestObserver
from core.cluster.choice import choose, divide
from core.cluster.lent_memory import LentMemories
from core.cluster.master import Master
from core.cluster.measuring import ClusterProfiler
from core.cluster.placed_stage import RemoteStages
from core.config import Settings
from core.devices import HOST, Device, MainMemory, open_devices
from core.engine.builder import EngineBuilder, check_memory
from core.engine.growth import Growth
from core.engine.model_engine import ModelEngine, ProgressCall
from core.engine.model_plan import Measures, ModelPlan, host_for, measure_with, plan_model, promised_bytes
from core.engine.recovery import Recovery
from core.engine.relocation import Relocation, Relocator
from core.engine.submission import make_request
from core.errors import (
    CheckpointError,
    ConflictError,
    EngineDeadError,
    InsufficientMemoryError,
    ModelChangedError,
    ModelNotLoadedError,
    StepFailedError,
    VRAMancerError,
)
from core.logs import get_logger
from core.metrics import MetricsRegistry
from core.models.checkpoint import Checkpoint
from core.models.fit import checked_notes
from core.models.resolve import ResolvedModel, resolve_model
from core.models.tokenizer import Tokenizer
from core.quantization.choice import QuantizeChoice
from core.request import SamplingParams
from core.transfer import TransferManager

logger = get_logger(__name__)


class EngineKeeper:
    """`engine` is the one that is served, `leaving` one that finishes what runs there. Thread-safe."""

    def __init__(
        self, settings: Settings, transfer: TransferManager, main_memory: MainMemory, metrics: MetricsRegistry,
        on_progress: ProgressCall | None, observers: tuple[RequestObserver, ...] = (), cluster: Master | None = None,
    ) -> None:  # fmt: skip
        self.engine: ModelEngine | None = None
        self.leaving: ModelEngine | None = None
        self.closing = False
        self._transfer = transfer
        self._main_memory = main_memory
        self._metrics = metrics
        self._observers = observers
        self._cluster = cluster
        self._lent = LentMemories(cluster) if cluster is not None else None
        self._on_progress = on_progress
        self._drain_s = settings.api.drain_timeout_s
        self._cpu_threads = settings.devices.cpu_threads or torch.get_num_threads()
        self._lock = threading.Lock()
        self.recovery = Recovery(self, self._move_off, cluster)
        self.growth: Growth | None = None
        if cluster is not None:
            self.growth = Growth(self, cluster, metrics.tasks, acts=settings.cluster.auto_place)

    @property
    def busy(self) -> bool:
        """Whether a model is being loaded, moved or unloaded."""
        return self._lock.locked()

    @contextmanager
    def exclusive(self, *, wait: bool = False) -> Iterator[None]:
        """One load, move or unload at a time: `engine` changes inside of this alone, and so does what is done by its
        value.

        Raises `EngineDeadError` while the server shuts down, and `ConflictError` unless it is to `wait`.
        """
        if not self._lock.acquire(blocking=wait):
            raise ConflictError("A model is being loaded or unloaded already; wait for that to finish.")
        try:
            self.refuse_when_closing()
            yield
        except BaseException as error:
            _clear_frames(error)
            raise
        finally:
            # Modules live as long as the model: once what was before is gone, the collector need not walk them in
            # mid-stream. What is frozen is never collected, so nothing may be that has ended.
            gc.unfreeze()
            gc.collect()
            if self.engine is not None:
                gc.freeze()
            self._lock.release()

    def refuse_when_closing(self) -> None:
        """Raise `EngineDeadError` once `close` has begun."""
        if self.closing:
            raise EngineDeadError("The server is shutting down.")

    def swap(self, settings: Settings) -> None:
        """Beside the present model if both fit; else the present one is drained first and restored on failure."""
        resolved = resolve_model(settings.model.name, settings.model.revision, cache_dir=settings.runtime.cache_dir)
        total = Checkpoint(resolved.path).total_bytes
        notes = checked_notes(resolved.path, settings.model.dtype, QuantizeChoice.of(settings.model))
        old = self.engine
        measure = self._measure(resolved, settings)

        def planned(old: ModelEngine | None, *, beside: bool) -> ModelPlan:
            devices = self._devices(settings, old, beside=beside)
            leaving = old.budgets[HOST] if old is not None and not beside else None
            host = host_for(settings, devices, self._main_memory, leaving)
            others = self._node_hosts(devices, old if beside else None)
            plan = plan_model(resolved, devices, settings, measure, host, others)
            return replace(plan, notes=(*plan.notes, *notes))

        plan = planned(old, beside=False)
        for note in plan.notes:
            logger.warning("plan", note=note)
        if old is None:
            try:
                engine = self._start(plan, settings, total)
            except InsufficientMemoryError as error:
                if settings.devices.devices is not None:
                    raise
                logger.warning("memory was taken since the plan was made; planning again", reason=error.message)
                engine = self._start(planned(None, beside=False), settings, total)
            self.serve_with(engine)
            return
        try:
            beside: ModelPlan | None = planned(old, beside=True)
        except VRAMancerError:
            beside = None
        if beside is None:
            self._replace(old, plan, settings, total)
            return
        engine = self._start(beside, settings, total)
        self.serve_with(engine, ModelChangedError(f"{old.model.name} has just been replaced; try again."))

    def serve_with(
        self, engine: ModelEngine | None, reason: VRAMancerError | None = None, drain_s: float | None = None
    ) -> None:
        """From now on; None: with nothing. What runs in the engine before may finish for `drain_s` (None: as set). What
        takes longer, or comes too late, is told the `reason`. The engine before keeps its tiers until it has ended, and
        writes down what it has; then those that outlast it are the new one's."""
        old = self.leaving = self.engine
        self.engine = engine
        self.recovery.forget()
        self._metrics.set_model(engine.model.name if engine is not None else None)
        try:
            if old is not None:
                old.close(drain_s=self._drain_s if drain_s is None else drain_s, reason=reason)
        finally:
            self.leaving = None
        if engine is not None:
            self._metrics.observe_placement(streams=engine.plan.placement.streamed_bytes > 0)
            engine.open_lasting()
        elif self._lent is not None:
            self._lent.give_up()

    def _replace(self, old: ModelEngine, plan: ModelPlan, settings: Settings, total: int) -> None:
        """Make room by closing the old engine; if the new one does not start, load the old model again."""
        logger.info("the new model does not fit beside the present one; draining it first", old=old.model.name)
        self.serve_with(None, ModelChangedError(f"{old.model.name} makes room for another model; try again."))
        try:
            engine = self._start(plan, settings, total)
        except BaseException as error:  # whatever it was, the old model has to be back before it is reported
            _clear_frames(error)
            try:
                self.serve_with(self._start(old.plan, old.settings, Checkpoint(old.plan.resolved.path).total_bytes))
            except Exception as failure:  # noqa: BLE001  the client has to hear that nothing is served now
                raise ModelNotLoadedError(
                    f"{error}; and {old.model.name}, which made room, cannot be loaded again: {failure}"
                ) from error
            raise
        self.serve_with(engine)

    def _devices(self, settings: Settings, old: ModelEngine | None, *, beside: bool) -> tuple[Device, ...]:
        """Devices with the limits a load may use. Given limits count what the old engine holds; free memory as it is
        measured does not.
        """
        devices = self._open(settings)
        if old is None:
            return devices
        explicit = settings.devices.devices is not None
        held = {name: budget.used_bytes for name, budget in old.budgets.items()}
        change = -1 if explicit and beside else 1 if not explicit and not beside else 0
        limits = [max(0, device.memory_limit_bytes + change * held.get(device.name, 0)) for device in devices]
        if beside and not all(limits):
            full = devices[limits.index(0)].name
            raise InsufficientMemoryError(f"{full} has nothing left beside {old.model.name}.", lacking_bytes={full: 1})
        return tuple(replace(device, memory_limit_bytes=limit) for device, limit in zip(devices, limits, strict=True))

    def _open(self, settings: Settings) -> tuple[Device, ...]:
        """This machine's devices, and those of the cluster's nodes."""
        aside, main = promised_bytes(settings), self._main_memory.limit_bytes
        if self._cluster is None:
            return open_devices(settings.devices, set_aside_bytes=aside, main_bytes=main)
        here, there = divide(settings.devices.devices)
        local: tuple[Device, ...] = ()
        if here != "":
            named = settings.devices.model_copy(update={"devices": here})
            local = open_devices(named, set_aside_bytes=aside, main_bytes=main)
        others = choose(self._cluster.devices(len(local)), there)
        return tuple(replace(device, index=index) for index, device in enumerate((*local, *others)))

    def _node_hosts(self, devices: Sequence[Device], beside: ModelEngine | None = None) -> tuple[Device, ...]:
        """Main memory of the machines that have the devices, as far as an engine `beside` leaves it."""
        hosts = self._cluster.hosts(devices) if self._cluster is not None else ()
        held = {name: budget.used_bytes for name, budget in beside.budgets.items()} if beside is not None else {}
        left = [max(0, host.memory_limit_bytes - held.get(host.name, 0)) for host in hosts]
        return tuple(replace(host, memory_limit_bytes=nbytes) for host, nbytes in zip(hosts, left, strict=True))

    def _measure(self, resolved: ResolvedModel, settings: Settings) -> Measures:
        here = measure_with(settings, self._transfer)
        return here if self._cluster is None else ClusterProfiler(here, self._cluster, resolved, settings)

    def _start(self, plan: ModelPlan, settings: Settings, total_bytes: int) -> ModelEngine:
        """Load the weights, then generate one token, so that readiness means that the model works. Not used before
        `serve_with`.

        Raises, before anything is allocated, `InsufficientMemoryError` if memory was taken since the plan was made.
        """
        lock, done_bytes = threading.Lock(), 0

        def read(nbytes: int) -> None:
            """Called by several threads."""
            nonlocal done_bytes
            self.refuse_when_closing()  # a shutdown does not wait for the rest of the weights
            with lock:
                done_bytes += nbytes
                if self._on_progress is not None:
                    self._on_progress(done_bytes, total_bytes)

        check_memory(plan)
        engine = self._builder(plan, settings, read).load()
        try:
            self._bring_up(engine)
        except BaseException as error:
            engine.close()
            if type(error) is StepFailedError:  # the model's own forward pass; lost devices and the like are others
                logger.warning("a model computes no token", model=engine.model.name, error=error.message)
                raise CheckpointError(
                    f"{engine.model.name} was read, but computes no token: its config.json or its weights are not what "
                    f"they should be, or it cannot be run yet. The log has the cause.",
                    param="model",
                ) from error
            raise
        logger.info(
            "model loaded",
            model=engine.model.name,
            seconds=round(engine.load_s, 2),
            stages=[f"{s.device_name}:{s.first_layer}-{s.last_layer - 1}" for s in plan.placement.stages],
            kv_tokens=plan.placement.kv_tokens,
            streamed_bytes=plan.placement.streamed_bytes,
            attention=engine.backends[0],
            tool_parser=engine.model.output_format.tool_parser,
            reasoning_parser=engine.model.output_format.reasoning_parser,
        )
        return engine

    def _builder(
        self, plan: ModelPlan, settings: Settings, on_read: Callable[[int], None], tokenizer: Tokenizer | None = None
    ) -> EngineBuilder:
        nodes = None
        if self._cluster is not None:
            nodes = RemoteStages(self._cluster, plan.resolved, plan.architecture, settings)
        return EngineBuilder(
            plan, settings, transfer=self._transfer, main_memory=self._main_memory, cpu_threads=self._cpu_threads,
            on_read=on_read, tokenizer=tokenizer, nodes=nodes, lent=self._lent,
        )  # fmt: skip

    def outlook(self, engine: ModelEngine, settings: Settings) -> Relocation:
        """What `place` would do."""
        return self._relocator(engine, settings, self._devices(settings, engine, beside=False)).outlook()

    def place(self, engine: ModelEngine, settings: Settings) -> Relocation:
        """Move the engine that is served to where it belongs by other settings; see `core.engine.relocation`."""
        return self._relocate(self._relocator(engine, settings, self._devices(settings, engine, beside=False)))

    def _relocator(
        self, engine: ModelEngine, settings: Settings, devices: Sequence[Device], lost: frozenset[str] = frozenset()
    ) -> Relocator:
        host = host_for(settings, devices, self._main_memory, engine.budgets[HOST])
        resolved = engine.plan.resolved
        measure, others = self._measure(resolved, settings), self._node_hosts(devices)
        plan = plan_model(resolved, devices, settings, measure, host, others)
        for note in plan.notes:
            logger.warning("plan", note=note)

        def build(plan: ModelPlan) -> EngineBuilder:
            chosen = settings if plan is not engine.plan else engine.settings
            return self._builder(plan, chosen, lambda nbytes: self.refuse_when_closing(), engine.model.tokenizer)

        def switch(engine: ModelEngine) -> None:
            self.engine = engine

        return Relocator(engine, plan, build, self._bring_up, switch, lost)

    def _relocate(self, relocator: Relocator) -> Relocation:
        try:
            moved = relocator.run()
        except BaseException:
            if self.engine is not None and not self.engine.batcher.alive:  # going back has failed too
                self.engine = None
            raise
        self._metrics.observe_placement(streams=relocator.plan.placement.streamed_bytes > 0)
        self._metrics.observe_migration(moved.moved_layers, unasked=bool(relocator.lost))
        return moved

    def _move_off(
        self, engine: ModelEngine, settings: Settings, devices: tuple[Device, ...], lost: frozenset[str], what_for: str
    ) -> None:
        with self._metrics.tasks.run("recovery", f"{engine.model.name}, {what_for}", priority="high", asked=False):
            self._relocate(self._relocator(engine, settings, devices, lost))

    def _bring_up(self, engine: ModelEngine) -> None:
        """To the first token, so that readiness means that the model works."""
        engine.batcher.intake.call_within(lambda: torch.set_num_threads(engine.torch_threads(self._cpu_threads)))
        self._warm_up(engine)
        engine.batcher.report_to(self._metrics, self._observers)
        engine.batcher.on_lost = self.recovery.device_lost

    def _warm_up(self, engine: ModelEngine) -> None:
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        request = make_request(engine.model, [0], params, priority=0, request_id="warm-up", default_seed=0)
        (handle,) = engine.batcher.submit([request])
        engine.produced_token = bool(handle.result().completions[0].token_ids)

    def close(self, drain_s: float) -> None:
        """Let what runs end within `drain_s`, then free everything. Safe to call twice."""
        self.closing = True
        self.recovery.close()
        if self.growth is not None:
            self.growth.close()
        with self._lock:
            self.serve_with(None, EngineDeadError("The server is shutting down."), drain_s)
            gc.unfreeze()


def _clear_frames(error: BaseException | None) -> None:
    """Let go of what the calls held that ended with this error: a model that was not loaded must not outlive it."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
