"""The composition root: load a model, serve it, swap it, shut down. Constructs every subsystem, holds no algorithm."""

from __future__ import annotations

import gc
import threading
import traceback
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch

from core.batching.output import RequestHandle, Sink
from core.batching.sequence import Request
from core.config import Settings
from core.defaults import DEFAULT_OWNER, DEMO_NAME
from core.devices import HOST, Device, DeviceReader, open_devices, open_main_memory, parse_link
from core.engine.builder import EngineBuilder, load_engine
from core.engine.model_engine import (
    LoadProgress,
    ModelEngine,
    ProgressCall,
    checkpoint_bytes,
)
from core.engine.model_plan import ModelPlan, host_for, measure_with, plan_model, promised_bytes
from core.engine.raw_inference import run_raw
from core.engine.relocation import Relocation, Relocator
from core.engine.submission import LoadedModel, check_prompt, make_request
from core.errors import (
    ConflictError,
    DeviceLostError,
    EngineDeadError,
    EngineMovedError,
    InsufficientMemoryError,
    ModelChangedError,
    ModelNotLoadedError,
    VRAMancerError,
)
from core.logs import get_logger
from core.metrics import MetricsRegistry
from core.models.resolve import resolve_model
from core.request import SamplingParams
from core.transfer import TransferManager
from core.views.metrics import metrics_snapshot
from core.views.state import ServiceState

logger = get_logger(__name__)


class InferencePipeline:
    """Thread-safe. `on_progress(done_bytes, total_bytes)` is told of weights as they are read."""

    def __init__(self, settings: Settings, *, on_progress: ProgressCall | None = None) -> None:
        self.settings = settings
        self.metrics = MetricsRegistry()
        link = settings.devices.sim_link
        self.main_memory = open_main_memory(settings.devices)
        self.transfer = TransferManager(
            self.metrics, sim_link=parse_link(link) if link else None, host=self.main_memory.budget
        )
        self.reader = DeviceReader()
        self._on_progress = on_progress
        self._engine: ModelEngine | None = None
        self._leaving: ModelEngine | None = None  # finishes what runs there
        self._load_lock = threading.Lock()
        self._closing = False
        self.metrics.set_snapshot_source(lambda: metrics_snapshot(self._engine))
        self._cpu_threads = settings.devices.cpu_threads or torch.get_num_threads()

    # -- the model --------------------------------------------------------------------------------------------------

    @property
    def engine(self) -> ModelEngine:
        """The running engine. Raises `ModelNotLoadedError`."""
        engine = self._engine
        if engine is None and self.loading:
            raise ModelNotLoadedError("A model is being loaded; try again in a moment.")
        if engine is None:
            raise ModelNotLoadedError("No model is loaded. Load one with POST /api/models/load.")
        return engine

    @property
    def model(self) -> LoadedModel:
        return self.engine.model

    @property
    def loaded(self) -> bool:
        return self._engine is not None

    @property
    def loading(self) -> bool:
        return self._load_lock.locked()

    def load(
        self,
        model: str | None = None,
        *,
        num_gpus: int | None = None,
        dtype: str | None = None,
        devices: str | None = None,
        max_model_len: int | None = None,
    ) -> LoadedModel:
        """Load a model and serve it in place of the present one, which goes on serving if anything fails.

        What is not given comes from the settings (the model's name and its length only on the first load). Raises
        the `ModelError` family, `DeviceError`, `ConflictError` while another load is under way, `EngineDeadError` while
        the server shuts down, and `ModelNotLoadedError` if the present model had to make room and cannot be loaded
        again either.
        """
        settings = self._load_settings(model, num_gpus, dtype, devices, max_model_len)
        with self._exclusive():
            self._swap(settings)
            return self.model

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One load or unload at a time: `_engine` changes inside of this alone, and so does what is done by its value.

        Raises `ConflictError`, or `EngineDeadError` while the server shuts down.
        """
        if not self._load_lock.acquire(blocking=False):
            raise ConflictError("A model is being loaded or unloaded already; wait for that to finish.")
        try:
            self._refuse_when_closing()
            yield
        except BaseException as error:
            _clear_frames(error)
            raise
        finally:
            # Modules live as long as the model: once what was before is gone, the collector need not walk them in
            # mid-stream. What is frozen is never collected, so nothing may be that has ended.
            gc.unfreeze()
            gc.collect()
            if self._engine is not None:
                gc.freeze()
            self._load_lock.release()

    def _refuse_when_closing(self) -> None:
        if self._closing:
            raise EngineDeadError("The server is shutting down.")

    def _load_settings(
        self, model: str | None, num_gpus: int | None, dtype: str | None, devices: str | None, max_model_len: int | None
    ) -> Settings:
        base = self.settings
        changes: dict[str, Any] = {"dtype": dtype} if dtype is not None else {}
        if model is not None:
            changes |= {"name": model, "max_model_len": max_model_len}
            if model != (base.model.name or DEMO_NAME):
                changes |= {"revision": None, "served_model_name": (), "chat_template": None}
        elif max_model_len is not None:
            changes["max_model_len"] = max_model_len
        placed = {key: value for key, value in (("num_gpus", num_gpus), ("devices", devices)) if value is not None}
        return base.model_copy(
            update={
                "model": type(base.model).model_validate(base.model.model_dump() | changes),
                "devices": type(base.devices).model_validate(base.devices.model_dump() | placed),
            }
        )

    def _swap(self, settings: Settings) -> None:
        """Beside the present model if both fit; else the present one is drained first and restored on failure."""
        resolved = resolve_model(settings.model.name, settings.model.revision)
        total = checkpoint_bytes(resolved.path)
        old = self._engine
        measure = measure_with(settings, self.transfer)

        def planned(old: ModelEngine | None, *, beside: bool) -> ModelPlan:
            devices = self._devices(settings, old, beside=beside)
            leaving = old.budgets[HOST] if old is not None and not beside else None
            host = host_for(settings, devices, self.main_memory, leaving)
            return plan_model(resolved, devices, settings, measure, host)

        plan = planned(old, beside=False)
        if old is None:
            try:
                engine = self._start(plan, settings, total)
            except InsufficientMemoryError as error:
                if settings.devices.devices is not None:
                    raise
                logger.warning("memory was taken since the plan was made; planning again", reason=error.message)
                plan = planned(None, beside=False)
                engine = self._start(plan, settings, total)
            self._serve_with(engine)
            return
        fits_beside = True
        try:
            plan = planned(old, beside=True)
        except VRAMancerError:
            fits_beside = False
        if not fits_beside:
            self._replace(old, plan, settings, total)
            return
        engine = self._start(plan, settings, total)
        self._serve_with(engine, ModelChangedError(f"{old.model.name} has just been replaced; try again."))

    def _serve_with(
        self, engine: ModelEngine | None, reason: VRAMancerError | None = None, drain_s: float | None = None
    ) -> None:
        """From now on; None: with nothing. What runs in the engine before may finish for `drain_s` (None: as set). What
        takes longer, or comes too late, is told the `reason`. The engine before keeps its tiers until it has ended, and
        writes down what it has; then those that outlast it are the new one's."""
        old = self._leaving = self._engine
        self._engine = engine
        try:
            if old is not None:
                old.close(drain_s=self.settings.api.drain_timeout_s if drain_s is None else drain_s, reason=reason)
        finally:
            self._leaving = None
        if engine is not None:
            engine.open_lasting()

    def _replace(self, old: ModelEngine, plan: ModelPlan, settings: Settings, total: int) -> None:
        """Make room by closing the old engine; if the new one does not start, load the old model again."""
        logger.info("the new model does not fit beside the present one; draining it first", old=old.model.name)
        self._serve_with(None, ModelChangedError(f"{old.model.name} makes room for another model; try again."))
        try:
            self._serve_with(self._start(plan, settings, total))
        except BaseException as error:  # whatever it was, the old model has to be back before it is reported
            _clear_frames(error)
            try:
                self._serve_with(self._start(old.plan, old.settings, checkpoint_bytes(old.plan.resolved.path)))
            except Exception as failure:  # noqa: BLE001  the client has to hear that nothing is served now
                raise ModelNotLoadedError(
                    f"{error}; and {old.model.name}, which made room, cannot be loaded again: {failure}"
                ) from error
            raise

    def _devices(self, settings: Settings, old: ModelEngine | None, *, beside: bool) -> tuple[Device, ...]:
        """Devices with the limits a load may use. Given limits count what the old engine holds; free memory as it is
        measured does not.
        """
        devices = open_devices(settings.devices, set_aside_bytes=promised_bytes(settings))
        if old is None:
            return devices
        explicit = settings.devices.devices is not None
        held = {name: budget.used_bytes for name, budget in old.budgets.items()}
        change = -1 if explicit and beside else 1 if not explicit and not beside else 0
        return tuple(
            Device(
                device.name, device.index, device.kind, device.torch_device,
                max(0, device.memory_limit_bytes + change * held.get(device.name, 0)), device.speed,
            )
            for device in devices
        )  # fmt: skip

    def _start(self, plan: ModelPlan, settings: Settings, total_bytes: int) -> ModelEngine:
        """Load the weights, then generate one token, so that readiness means that the model works. Not used before
        `_serve_with`."""
        done = LoadProgress(total_bytes, self._on_progress)

        def read(nbytes: int) -> None:
            self._refuse_when_closing()  # a shutdown does not wait for the rest of the weights
            done.add(nbytes)

        engine = load_engine(
            plan, settings, transfer=self.transfer, main_memory=self.main_memory, cpu_threads=self._cpu_threads,
            on_read=read,
        )  # fmt: skip
        try:
            self._bring_up(engine)
        except BaseException:
            engine.close()
            raise
        logger.info(
            "model loaded",
            model=engine.model.name,
            seconds=round(engine.load_s, 2),
            stages=[f"{s.device_name}:{s.first_layer}-{s.last_layer - 1}" for s in plan.placement.stages],
            kv_tokens=plan.placement.kv_tokens,
            streamed_bytes=plan.placement.streamed_bytes,
            attention=engine.backends[0],
        )
        return engine

    def place(
        self,
        *,
        devices: str | None = None,
        placement: str | None = None,
        layers: str | None = None,
        objective: str | None = None,
        dry_run: bool = False,
    ) -> Relocation:
        """Move the running model to other devices or cuts while its requests go on; see `core.engine.relocation`.

        `devices` None: every device of the machine. What else is not given is as the model was placed, but for layers
        by hand. With `dry_run` nothing changes. Raises what a load does, and `ConflictError` if a request that runs
        would not fit; then the old placement serves on.
        """
        with self._exclusive():
            engine = self.engine
            given = {"placement": placement, "objective": objective}
            changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
            changes |= {"devices": devices, "layers": layers, "num_gpus": None}
            base = engine.settings.devices
            settings = engine.settings.model_copy(
                update={"devices": type(base).model_validate(base.model_dump() | changes)}
            )
            relocator = self._relocator(engine, settings, self._devices(settings, engine, beside=False))
            return relocator.outlook() if dry_run else self._relocate(relocator)

    def _relocator(
        self, engine: ModelEngine, settings: Settings, devices: Sequence[Device], lost: frozenset[str] = frozenset()
    ) -> Relocator:
        host = host_for(settings, devices, self.main_memory, engine.budgets[HOST])
        plan = plan_model(engine.plan.resolved, devices, settings, measure_with(settings, self.transfer), host)

        def build(plan: ModelPlan) -> EngineBuilder:
            chosen = settings if plan is not engine.plan else engine.settings
            return EngineBuilder(
                plan, chosen, transfer=self.transfer, main_memory=self.main_memory, cpu_threads=self._cpu_threads,
                on_read=lambda nbytes: self._refuse_when_closing(), tokenizer=engine.model.tokenizer,
            )  # fmt: skip

        def switch(engine: ModelEngine) -> None:
            self._engine = engine

        return Relocator(engine, plan, build, self._bring_up, switch, lost)

    def _relocate(self, relocator: Relocator) -> Relocation:
        try:
            return relocator.run()
        except BaseException:
            if self._engine is not None and not self._engine.batcher.alive:  # going back has failed too
                self._engine = None
            raise

    def _device_lost(self, error: DeviceLostError) -> bool:
        """A device of the engine does not answer. True: what runs there will be moved to the others."""
        engine = self._engine
        if self._closing or engine is None:
            return False
        others = tuple(device for device in engine.plan.devices if device.name != error.device)
        if not others:
            return False
        logger.error("a device is lost; moving to the others", device=error.device, reason=error.message)
        threading.Thread(target=self._leave, args=(engine, others, error), name="vrm-relocation", daemon=True).start()
        return True

    def _leave(self, engine: ModelEngine, devices: tuple[Device, ...], error: DeviceLostError) -> None:
        with self._load_lock:
            if self._engine is not engine or self._closing:
                return
            base = engine.settings.devices
            placed = base.model_copy(update={"layers": None, "placement": base.placement})
            settings = engine.settings.model_copy(update={"devices": placed})
            try:
                numbered = tuple(replace(device, index=index) for index, device in enumerate(devices))
                self._relocate(self._relocator(engine, settings, numbered, frozenset({error.device})))
            except Exception as failure:
                logger.error("the model could not be moved off a lost device", exc_info=failure)
                if self._engine is engine:
                    engine.batcher.on_lost = lambda error: False
                    engine.batcher.resume()

    def _bring_up(self, engine: ModelEngine) -> None:
        """To the first token, so that readiness means that the model works."""
        engine.batcher.intake.call_within(lambda: torch.set_num_threads(engine.torch_threads(self._cpu_threads)))
        self._warm_up(engine)
        engine.batcher.report_to(self.metrics)
        engine.batcher.on_lost = self._device_lost

    def _warm_up(self, engine: ModelEngine) -> None:
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        (handle,) = engine.batcher.submit([self._request(engine, [0], params, 0, "warm-up")])
        engine.produced_token = bool(handle.result().completions[0].token_ids)

    def unload(self) -> LoadedModel:
        """Stop serving and free the model's memory; returns what was served. Raises `ModelNotLoadedError`,
        `ConflictError`."""
        with self._exclusive():
            if self._engine is None:
                raise ModelNotLoadedError("No model is loaded.")
            model = self._engine.model
            self._serve_with(None, ModelNotLoadedError(f"{model.name} has just been unloaded."))
            return model

    # -- requests ---------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        request_id: str | None = None,
        owner: str = DEFAULT_OWNER,
    ) -> RequestHandle:
        """Start one request of `owner`. A lower `priority` is served earlier.

        Raises, before anything is allocated, `InvalidRequestError`, `ContextLengthError`, `QueueFullError`,
        `CircuitOpenError`, `EngineDeadError` or `ModelNotLoadedError`.
        """
        request_id = request_id or f"req-{uuid.uuid4().hex}"
        requests = [(prompt_token_ids, params)]
        return self._submit(requests, [request_id], priority, owner)[0]

    def submit_many(
        self,
        requests: Sequence[tuple[Sequence[int], SamplingParams]],
        *,
        priority: int = 0,
        request_id: str | None = None,
        sink: Sink | None = None,
        model: LoadedModel | None = None,
        owner: str = DEFAULT_OWNER,
    ) -> list[RequestHandle]:
        """Start several requests, all or none. With `sink`, their outputs arrive there as `(index, message)`.

        Token ids mean nothing to another model: with `model`, raises `ModelChangedError` if that is no longer served.
        """
        base = request_id or f"req-{uuid.uuid4().hex}"
        ids = [f"{base}-{index}" for index in range(len(requests))]
        return self._submit(requests, ids, priority, owner, sink, model)

    def _submit(
        self, requests: Sequence[tuple[Sequence[int], SamplingParams]], ids: Sequence[str], priority: int, owner: str,
        sink: Sink | None = None, model: LoadedModel | None = None,
    ) -> list[RequestHandle]:  # fmt: skip
        """To the engine that serves, also if that changes right now."""
        while True:
            engine = self.engine
            if model is not None and engine.model.tokenizer is not model.tokenizer:
                raise ModelChangedError(f"{model.name} has just been replaced by {engine.model.name}; try again.")
            made = [
                self._request(engine, tokens, params, priority, name, owner)
                for (tokens, params), name in zip(requests, ids, strict=True)
            ]
            try:
                return engine.batcher.submit(made, sink=sink)
            except EngineMovedError:
                if self._engine is engine:
                    raise

    def _request(
        self, engine: ModelEngine, tokens: Sequence[int], params: SamplingParams, priority: int, request_id: str,
        owner: str = DEFAULT_OWNER,
    ) -> Request:  # fmt: skip
        self._refuse_when_closing()
        seed = self.settings.runtime.default_seed
        return make_request(
            engine.model, tokens, params, priority=priority, request_id=request_id, default_seed=seed, owner=owner
        )

    def cancel(self, request_id: str) -> bool:
        """Abort a request, or all that were submitted under the id as `<id>-0`, `<id>-1`... False if there is none."""
        now, leaving = self._engine, self._leaving  # in this order: an engine leaves before another takes its place
        if now is None and leaving is None:
            raise ModelNotLoadedError("No model is loaded, so nothing runs.")
        found = False
        for engine in {id(each): each for each in (now, leaving) if each is not None}.values():
            for name in engine.batcher.matching(request_id):
                engine.batcher.abort(name)
                found = True
        return found

    def infer(
        self,
        token_ids: Sequence[int],
        *,
        output: Literal["logits", "hidden_states"] = "logits",
        positions: Literal["last", "all"] = "last",
    ) -> torch.Tensor:
        """One raw forward pass over the tokens. Returns fp32 on the CPU, `[P, vocab]` or `[P, hidden_size]`.

        Raises `InvalidRequestError`, `ContextLengthError`, `QueueFullError` if no KV blocks are free for it, and
        `UnavailableError` if the engine does not come to it.
        """
        engine = self.engine
        tokens = list(token_ids)
        check_prompt(tokens, engine.model, reserve=0)
        return engine.batcher.intake.call_within(lambda: run_raw(engine, tokens, output, positions))

    # -- state ------------------------------------------------------------------------------------------------------

    def ready(self) -> tuple[bool, str]:
        """Whether requests are taken, the engine is alive and the model has really produced a token; if not, why."""
        engine = self._engine
        if self._closing:
            return False, "the server is shutting down"
        if engine is None:
            return False, "a model is being loaded" if self.loading else "no model is loaded"
        if not engine.batcher.alive:
            return False, "the engine has stopped"
        if not engine.produced_token:
            return False, "no token has been produced yet"
        return True, "ready"

    def state(self) -> ServiceState:
        """What views show of the service beside its engine."""
        ready, reason = self.ready()
        engine = self.settings.engine
        return ServiceState(
            loading=self.loading,
            closing=self._closing,
            ready=ready,
            reason=reason,
            max_queue=engine.max_queue,
            max_batch_size=engine.max_batch_size,
            cache_dir=self.settings.runtime.cache_dir,
            transfers=self.transfer.stats(),
        )

    @property
    def current_engine(self) -> ModelEngine | None:
        """The running engine, if there is one."""
        return self._engine

    def shutdown(self, *, drain_s: float = 0.0) -> None:
        """Refuse new requests, let running ones finish for up to `drain_s`, free everything. Safe to call twice."""
        self._closing = True
        with self._load_lock:
            self._serve_with(None, EngineDeadError("The server is shutting down."), drain_s)
            self.transfer.close()
            gc.unfreeze()


def _clear_frames(error: BaseException | None) -> None:
    """Let go of what the calls held that ended with this error: a model that was not loaded must not outlive it."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
