"""The composition root: load a model, serve it, swap it, shut down. Constructs every subsystem, holds no algorithm."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from prometheus_client.core import Metric

from core.batching.intake import Load
from core.batching.output import RequestHandle, Sink
from core.batching.sequence import RawAnswer, RawOutput, RawPositions, Request
from core.batching.traced import Traced
from core.cluster.master import Master
from core.config import Settings
from core.defaults import DEFAULT_OWNER, DEMO_NAME, NO_MODEL
from core.devices import Device, open_main_memory, parse_link
from core.devices.monitor import GPUMonitor
from core.devices.readings import DeviceReading
from core.embedding.service import Encoders
from core.engine.keeper import EngineKeeper
from core.engine.model_engine import ModelEngine, ProgressCall
from core.engine.relocation import Relocation
from core.engine.submission import LoadedModel, make_raw_request, make_request
from core.errors import (
    ConflictError,
    EngineMovedError,
    InvalidRequestError,
    ModelChangedError,
    ModelNotLoadedError,
    UnavailableError,
)
from core.logs import get_logger
from core.metrics import MetricsRegistry
from core.parsers.families import ReasoningParserName, ToolParserName
from core.request import SamplingParams, TraceContext
from core.tracing import open_tracing
from core.transfer import TransferManager
from core.upstreams.replica import Reported
from core.upstreams.upstreams import Upstreams
from core.views.encoders import encoder_metrics
from core.views.metrics import engine_metrics
from core.views.network_metrics import TRANSPORT, network_metrics
from core.views.state import ServiceState
from core.views.upstream_metrics import upstream_metrics

logger = get_logger(__name__)

MISSING_RETRY_S = 10.0
"""After which clients may ask again whose model waits for a device."""


class InferencePipeline:
    """Thread-safe. `on_progress(done_bytes, total_bytes)` is told of weights as they are read. `cluster` has devices of
    other machines, which are used too."""

    def __init__(
        self, settings: Settings, *, on_progress: ProgressCall | None = None, cluster: Master | None = None
    ) -> None:
        self.settings = settings
        self.metrics = MetricsRegistry()
        self.cluster = cluster
        self.waiting_for: str | None = None
        """What a model that is not loaded yet waits for; see `vramancer/late.py`."""
        self.tracing = open_tracing(settings.tracing)
        if self.tracing is not None:
            self.metrics.tasks.watch = self.tracing.task
        link = settings.devices.sim_link
        self.main_memory = open_main_memory(settings.devices)
        self.transfer = TransferManager(
            self.metrics, sim_link=parse_link(link) if link else None, host=self.main_memory.budget
        )
        observers = (self.tracing.requests,) if self.tracing is not None else ()
        self.encoders = Encoders(settings, self.main_memory)
        self._keeper = EngineKeeper(
            settings, self.transfer, self.main_memory, self.metrics, on_progress, observers, cluster
        )
        self.upstreams = Upstreams(settings.backend, self._own_load)
        self.monitor = GPUMonitor(self._devices, settings.monitoring.interval_s)
        self.metrics.set_engine_source(self._metrics_now)
        if cluster is not None:
            cluster.observe = partial(self.metrics.observe_fastpath, TRANSPORT)
            cluster.transferred = self.metrics.observe_transfer

    def _devices(self) -> Sequence[Device]:
        engine = self._keeper.engine
        return [device for device in engine.plan.devices if device.is_here] if engine is not None else ()

    def _readings(self) -> Mapping[str, DeviceReading]:
        """Of this machine's devices and of its nodes'."""
        if self.cluster is None:
            return self.monitor.readings
        return {**self.monitor.readings, **self.cluster.readings()}

    def _own_load(self) -> Reported | None:
        """For the router among replicas; None: the model that is loaded here cannot serve now."""
        engine = self._keeper.engine
        if engine is None or not self.ready()[0]:
            return None
        stats, held = engine.batcher.stats, engine.batcher.intake.load
        waiting_tokens = held.tokens * stats.waiting // max(1, stats.running + stats.waiting)
        return Reported(stats.running, stats.waiting, waiting_tokens, self.settings.engine.max_batch_size)

    def _metrics_now(self) -> Iterator[Metric]:
        yield from engine_metrics(self._keeper.engine, self._readings())
        yield from network_metrics(self.cluster)
        yield from upstream_metrics(self.upstreams.groups())
        yield from encoder_metrics(self.encoders.all())

    # -- the model --------------------------------------------------------------------------------------------------

    @property
    def engine(self) -> ModelEngine:
        """The running engine. Raises `ModelNotLoadedError`."""
        engine = self._keeper.engine
        if engine is None and self.loading:
            raise ModelNotLoadedError("A model is being loaded; try again in a moment.")
        if engine is None and self.waiting_for is not None:
            raise ModelNotLoadedError(f"No model is loaded yet: {self.waiting_for}", retry_after_s=MISSING_RETRY_S)
        if engine is None:
            raise ModelNotLoadedError("No model is loaded here. Load one with POST /api/models/load.")
        return engine

    @property
    def model(self) -> LoadedModel:
        return self.engine.model

    @property
    def loading(self) -> bool:
        return self._keeper.busy

    def load(
        self,
        model: str | None = None,
        *,
        num_gpus: int | None = None,
        dtype: str | None = None,
        devices: str | None = None,
        max_model_len: int | None = None,
        quantize: str | None = None,
        quantize_group: int | None = None,
        tool_parser: ToolParserName | None = None,
        reasoning_parser: ReasoningParserName | None = None,
    ) -> LoadedModel:
        """Load a model and serve it in place of the present one, which goes on serving if anything fails.

        What is not given comes from the settings (the model's name and its length only on the first load). Raises
        the `ModelError` family, `DeviceError`, `ConflictError` while another load is under way, `EngineDeadError` while
        the server shuts down, and `ModelNotLoadedError` if the present model had to make room and cannot be loaded
        again either.
        """
        parsers = {"tool_parser": tool_parser, "reasoning_parser": reasoning_parser}
        weights = {"dtype": dtype, "quantize": quantize, "quantize_group": quantize_group}
        settings = self._load_settings(model, num_gpus, devices, max_model_len, weights, parsers)
        with self._keeper.exclusive(), self.metrics.tasks.run("load", settings.model.name or DEMO_NAME):
            self.encoders.open()
            self._keeper.swap(settings)
            self.monitor.start()
            loaded = self.model
        for name in (loaded.name, *loaded.aliases):
            group = self.upstreams.find(name)
            if group is not None and not group.has_self:
                logger.warning("requests for this name go to other servers, not to the loaded model", name=name)
        if self._keeper.growth is not None:
            self._keeper.growth.look_soon()
        return loaded

    def open_without_model(self) -> None:
        """Serve what other servers, the embedding model and the reranker answer for, until a model is loaded. Raises
        what opening encoders does."""
        with self._keeper.exclusive():
            self.encoders.open()
            self.monitor.start()

    def _load_settings(
        self, model: str | None, num_gpus: int | None, devices: str | None, max_model_len: int | None,
        weights: Mapping[str, str | int | None], parsers: Mapping[str, str | None],
    ) -> Settings:  # fmt: skip
        base = self.settings
        if model is None and base.model.name == NO_MODEL:
            raise InvalidRequestError("The settings name no model; say which one to load.", param="model")
        changes: dict[str, Any] = {key: value for key, value in weights.items() if value is not None}
        if model is not None:
            changes |= {"name": model, "max_model_len": max_model_len}
            if model != (base.model.name or DEMO_NAME):
                changes |= {"revision": None, "served_model_name": (), "chat_template": None}
                changes |= dict.fromkeys(parsers, "auto")
        elif max_model_len is not None:
            changes["max_model_len"] = max_model_len
        changes |= {key: value for key, value in parsers.items() if value is not None}
        placed = {key: value for key, value in (("num_gpus", num_gpus), ("devices", devices)) if value is not None}
        return base.model_copy(
            update={
                "model": type(base.model).model_validate(base.model.model_dump() | changes),
                "devices": type(base.devices).model_validate(base.devices.model_dump() | placed),
            }
        )

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
        with self._keeper.exclusive():
            engine = self.engine
            given = {"placement": placement, "objective": objective}
            changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
            changes |= {"devices": devices, "layers": layers, "num_gpus": None}
            base = engine.settings.devices
            settings = engine.settings.model_copy(
                update={"devices": type(base).model_validate(base.model_dump() | changes)}
            )
            if dry_run:
                return self._keeper.outlook(engine, settings)
            with self.metrics.tasks.run("placement", engine.model.name):
                return self._keeper.place(engine, settings)

    def unload(self) -> LoadedModel:
        """Stop serving and free the model's memory; returns what was served. Raises `ModelNotLoadedError`,
        `ConflictError`."""
        with self._keeper.exclusive():
            if self._keeper.engine is None:
                raise ModelNotLoadedError("No model is loaded.")
            model = self._keeper.engine.model
            with self.metrics.tasks.run("unload", model.name):
                self._keeper.serve_with(None, ModelNotLoadedError(f"{model.name} has just been unloaded."))
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
        return self._submit([(prompt_token_ids, params)], [request_id], priority, owner)[0]

    def submit_many(
        self,
        requests: Sequence[tuple[Sequence[int], SamplingParams]],
        *,
        priority: int = 0,
        request_id: str | None = None,
        sink: Sink | None = None,
        model: LoadedModel | None = None,
        owner: str = DEFAULT_OWNER,
        trace: TraceContext | None = None,
    ) -> list[RequestHandle]:
        """Start several requests, all or none. With `sink`, their outputs arrive there as `(index, message)`.

        Token ids mean nothing to another model: with `model`, raises `ModelChangedError` if that is no longer served.
        `trace` is the span that they are made in, if a trace is recorded.
        """
        base = request_id or f"req-{uuid.uuid4().hex}"
        ids = [f"{base}-{index}" for index in range(len(requests))]
        return self._submit(requests, ids, priority, owner, sink, model, trace)

    def _submit(
        self, requests: Sequence[tuple[Sequence[int], SamplingParams]], ids: Sequence[str], priority: int, owner: str,
        sink: Sink | None = None, model: LoadedModel | None = None, trace: TraceContext | None = None,
    ) -> list[RequestHandle]:  # fmt: skip
        seed = self.settings.runtime.default_seed

        def make(engine: ModelEngine) -> list[Request]:
            each = [(params.num_sequences, len(tokens)) for tokens, params in requests]
            engine.batcher.intake.check_size(Load(sum(n for n, _ in each), sum(n * length for n, length in each)))
            return [
                make_request(
                    engine.model, tokens, params, priority=priority, request_id=name, owner=owner, default_seed=seed
                )
                for (tokens, params), name in zip(requests, ids, strict=True)
            ]

        return self._start(make, sink, model, trace)

    def _start(
        self, make: Callable[[ModelEngine], list[Request]], sink: Sink | None, model: LoadedModel | None,
        trace: TraceContext | None,
    ) -> list[RequestHandle]:  # fmt: skip
        """Submit what `make` makes for the engine that serves, also if that changes right now."""
        while True:
            engine = self.engine
            if model is not None and engine.model.tokenizer is not model.tokenizer:
                raise ModelChangedError(f"{model.name} has just been replaced by {engine.model.name}; try again.")
            if self._keeper.closing:
                self._keeper.refuse_when_closing()
            if self._keeper.recovery.missing is not None:
                raise UnavailableError(self._keeper.recovery.missing, retry_after_s=MISSING_RETRY_S)
            made = make(engine)
            if trace is not None:
                for request in made:
                    request.traced = Traced(trace)
            try:
                return engine.batcher.submit(made, sink=sink)
            except EngineMovedError:
                if self._keeper.engine is engine:
                    raise

    def cancel(self, request_id: str) -> bool:
        """Abort a request, or all that were submitted under the id as `<id>-0`, `<id>-1`... False if there is none."""
        # In this order: an engine leaves before another takes its place.
        if self.encoders.cancel(request_id):
            return True
        now, leaving = self._keeper.engine, self._keeper.leaving
        if now is None and leaving is None:
            raise ModelNotLoadedError("No model is loaded, so nothing runs.")
        found = False
        for engine in {id(each): each for each in (now, leaving) if each is not None}.values():
            for name in engine.batcher.intake.matching(request_id):
                engine.batcher.abort(name)
                found = True
        return found

    def submit_raw(
        self,
        token_ids: Sequence[int],
        raw: RawAnswer,
        *,
        request_id: str | None = None,
        sink: Sink | None = None,
        model: LoadedModel | None = None,
        owner: str = DEFAULT_OWNER,
        trace: TraceContext | None = None,
    ) -> RequestHandle:
        """Start one forward pass over the tokens, in pieces between the steps of other requests. Once the handle has
        its last output, `raw` has the numbers, unless the request was aborted. The rest is as for `submit_many`."""
        return self.submit_raw_many(
            [(token_ids, raw)], request_id=request_id, sink=sink, model=model, owner=owner, trace=trace
        )[0]

    def submit_raw_many(
        self,
        asked: Sequence[tuple[Sequence[int], RawAnswer]],
        *,
        request_id: str | None = None,
        sink: Sink | None = None,
        model: LoadedModel | None = None,
        owner: str = DEFAULT_OWNER,
        trace: TraceContext | None = None,
    ) -> list[RequestHandle]:
        """The same for several prompts, all or none."""
        name = request_id or f"req-{uuid.uuid4().hex}"
        names = [name] if len(asked) == 1 else [f"{name}-{index}" for index in range(len(asked))]

        def make(engine: ModelEngine) -> list[Request]:
            return [
                make_raw_request(engine.model, token_ids, raw, request_id=each, owner=owner)
                for (token_ids, raw), each in zip(asked, names, strict=True)
            ]

        return self._start(make, sink, model, trace)

    def infer(
        self, token_ids: Sequence[int], *, output: RawOutput = "logits", positions: RawPositions = "last"
    ) -> torch.Tensor:
        """One raw forward pass over the tokens. Returns fp32 on the CPU, `[P, vocab]` or `[P, hidden_size]`.

        Raises `ConflictError` if it was cancelled, and whatever `submit` does.
        """
        raw = RawAnswer(output, positions)
        (completion,) = self.submit_raw(token_ids, raw).result().completions
        if completion.finish_reason != "stop":
            raise ConflictError("The request was cancelled.")
        return torch.from_numpy(raw.values())

    # -- state ------------------------------------------------------------------------------------------------------

    def ready(self) -> tuple[bool, str]:
        """Whether requests are taken, the engine is alive and the model has really produced a token; if not, why.
        Where there is to be no model: whether anything else can be asked."""
        engine = self._keeper.engine
        if self._keeper.closing:
            return False, "the server is shutting down"
        if engine is None and self.settings.model.name == NO_MODEL and not self.loading:
            served = bool(self.encoders.all()) or any(group.available() for group in self.upstreams.groups())
            return served, "ready" if served else "no other server can be asked"
        if engine is None:
            waits = f"waiting for machines: {self.waiting_for}" if self.waiting_for is not None else None
            return False, "a model is being loaded" if self.loading else waits or "no model is loaded"
        if not engine.batcher.alive:
            return False, "the engine has stopped"
        if self._keeper.recovery.missing is not None:
            return False, self._keeper.recovery.missing
        if not engine.produced_token:
            return False, "no token has been produced yet"
        return True, "ready"

    def state(self) -> ServiceState:
        """What views show of the service beside its engine."""
        return ServiceState(
            self.loading, self._keeper.closing, *self.ready(), settings=self.settings, transfers=self.transfer.stats(),
            latency=self.metrics.latency, readings=self._readings(), cluster=self.cluster,
            offer=self._keeper.growth.offer if self._keeper.growth is not None else None,
            upstreams=self.upstreams.views(),
            encoders=tuple(self.encoders.all()),
        )  # fmt: skip

    @property
    def current_engine(self) -> ModelEngine | None:
        """The running engine, if there is one."""
        return self._keeper.engine

    def shutdown(self, *, drain_s: float = 0.0) -> None:
        """Refuse new requests, let running ones finish for up to `drain_s`, free everything. Safe to call twice."""
        self._keeper.close(drain_s)
        self.upstreams.close()
        self.encoders.close()
        self.monitor.close()
        self.transfer.close()
        if self.tracing is not None:
            self.tracing.close()
