"""What monitoring shows of a model at work: placement, stages, prediction, transfers, queue, batch, devices."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from core.batching.sequence import Request
from core.batching.stats import BatcherStats
from core.costs import StagePlan
from core.engine.model_engine import ModelEngine
from core.metrics import Percentiles
from core.models.checkpoint import Checkpoint
from core.models.resolve import AvailableModel, available_models
from core.transfer.manager import Link, TransferStats
from core.views.health import Check, health
from core.views.memory import MemoryView, memory_view
from core.views.render import view_of
from core.views.state import ServiceState


@dataclass(frozen=True, slots=True)
class StageView:
    """One stage. `layers` are its first and last; `predicted_seconds` are to be compared with `busy_seconds`, and None
    where speeds were not measured."""

    index: int
    device: str
    layers: tuple[int, int]
    weight_bytes: int
    streamed_layers: tuple[int, ...]
    streamed_bytes: int
    stream_slot_bytes: int
    stream_wait_seconds: float
    kv_bytes: int
    workspace_bytes: int
    limit_bytes: int
    attention: str
    forwards: int
    seconds_per_forward: float | None
    busy_seconds: float
    predicted_seconds: float | None


@dataclass(frozen=True, slots=True)
class PredictionView:
    """What the cost model expects of the placement, by streams of `context` tokens, beside what is measured `now` of
    those that run. `floor_seconds` a token is what no step can be faster than."""

    context: int
    floor_seconds: float
    tokens_per_second: Mapping[int, float]
    now: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class NoModelView:
    """The pipeline while nothing is loaded."""

    ready: bool
    state: str
    subsystems: Mapping[str, Check]
    model: None = None
    stages: tuple[StageView, ...] = ()


@dataclass(frozen=True, slots=True)
class PipelineView:
    """The pipeline with a model. `prediction` is None where speeds were not measured; `transfers` are totals of each
    way from device to device; `notes` say where the plan is not what was asked for."""

    ready: bool
    state: str
    subsystems: Mapping[str, Check]
    model: Mapping[str, object]
    placement: Mapping[str, object]
    kv_cache: Mapping[str, int]
    memory: MemoryView
    stages: tuple[StageView, ...]
    prediction: PredictionView | None
    transfers: tuple[Mapping[str, object], ...]
    notes: tuple[str, ...]


MAX_REQUESTS_SHOWN = 32
"""Of those that are not finished, the oldest."""


@dataclass(frozen=True, slots=True)
class RequestView:
    """An unfinished request. `state` is that of the sequence that has come furthest: running, or else waiting, loading
    its prefix from a tier below, or forking from a sibling's prompt; `age_seconds` count from when it came."""

    id: str
    state: str
    prompt_tokens: int
    generated_tokens: int
    age_seconds: float


@dataclass(frozen=True, slots=True)
class QueueView:
    """Sequences that run and wait, requests that are not finished, and how many sequences may wait.
    `unfinished_sequences` and what follows it are what unfinished requests hold of the queue, those included that have
    just come. `circuit_breaker` has its state (closed, open or half-open), failures in a row, and the last error;
    `requests` are the oldest unfinished ones."""

    running: int
    waiting: int
    unfinished: int
    limit: int
    circuit_breaker: Mapping[str, object]
    unfinished_sequences: int = 0
    prompt_tokens: int = 0
    prompt_tokens_limit: int = 0
    requests: tuple[RequestView, ...] = ()


@dataclass(frozen=True, slots=True)
class BatcherView:
    """Counters since the start, the last step's batch, and the rate of the last seconds. Those of `kv_blocks` that are
    cached are free and still hold a prefix. `latency` has seconds to the first token, between tokens and of whole
    requests, over the last minutes."""

    steps: int
    failed_steps: int
    running: int
    waiting: int
    batch_size: int
    batch_tokens: int
    tokens_per_second: float
    generated_tokens: int
    preemptions: int
    prefix_hit_rate: float
    kv_blocks: Mapping[str, int]
    max_batch_size: int
    latency: Mapping[str, Percentiles]


def pipeline_view(engine: ModelEngine | None, service: ServiceState) -> PipelineView | NoModelView:
    """`/api/pipeline/status`: model, placement, stages and subsystems."""
    subsystems = health(engine, service).checks
    if engine is None:
        return NoModelView(service.ready, service.reason, subsystems)
    model, placement = engine.model, engine.plan.placement
    return PipelineView(
        ready=service.ready,
        state=service.reason,
        subsystems=subsystems,
        model={
            "name": model.name,
            "aliases": model.aliases,
            "dtype": model.dtype,
            "parameters": model.num_parameters,
            "max_model_len": model.max_model_len,
            "load_seconds": round(engine.load_s, 3),
        },
        placement={"strategy": placement.strategy, "unused_devices": placement.unused_devices},
        kv_cache={"tokens": engine.kv.capacity_tokens, "block_size": engine.kv.block_size},
        memory=memory_view(engine),
        stages=tuple(_stage(engine, index, plan) for index, plan in enumerate(placement.stages)),
        prediction=_prediction(engine),
        transfers=tuple(_transfers(*item) for item in service.transfers.items()),
        notes=engine.plan.notes,
    )


def _stage(engine: ModelEngine, index: int, plan: StagePlan) -> StageView:
    """Sizes are the plan's: a swap may free the stage while it is looked at."""
    stage = engine.stages[index]
    forwards, busy_s = stage.forwards, stage.busy_s
    block_size = engine.kv.block_size
    local_blocks = engine.plan.pooled.local_tokens[index] // block_size
    return view_of(
        StageView,
        plan,
        index=index,
        device=plan.device_name,
        layers=(plan.first_layer, plan.last_layer - 1),
        weight_bytes=stage.weight_bytes,
        stream_slot_bytes=plan.slot_bytes,
        stream_wait_seconds=round(stage.report().stream_wait_s, 3),
        kv_bytes=local_blocks * block_size * plan.kv_bytes_per_token,
        attention=engine.backends[index],
        forwards=forwards,
        seconds_per_forward=round(busy_s / forwards, 6) if forwards else None,
        busy_seconds=round(busy_s, 3),
        predicted_seconds=round(stage.predicted_s, 3) if engine.plan.is_measured else None,
    )


def _transfers(link: Link, stats: TransferStats) -> dict[str, object]:
    rate = round(stats.bytes / stats.seconds) if stats.seconds else None
    return dict(zip(("method", "src", "dst"), link, strict=True)) | asdict(stats) | {"bytes_per_second": rate}


def _prediction(engine: ModelEngine) -> PredictionView | None:
    prediction, stats = engine.plan.prediction, engine.batcher.stats
    if prediction is None:
        return None
    now = round(engine.predicted_tok_s(stats.running), 2) if stats.running else None
    return PredictionView(
        context=prediction.context,
        floor_seconds=prediction.floor_s,
        tokens_per_second={rate.streams: round(rate.tok_s, 2) for rate in prediction.rates},
        now={"streams": stats.running, "predicted": now, "measured": round(stats.tokens_per_s, 2)},
    )


def queue_view(engine: ModelEngine | None, service: ServiceState) -> QueueView:
    """`/api/queue/status`."""
    limit = service.settings.engine.max_queue
    if engine is None:
        closed = {"state": "closed", "failures": 0, "last_error": None}
        return QueueView(0, 0, 0, limit, closed, prompt_tokens_limit=service.settings.engine.max_queued_tokens)
    stats, breaker = engine.batcher.stats, engine.batcher.breaker
    shown = {"state": breaker.state, "failures": breaker.consecutive_failures, "last_error": breaker.last_error}
    intake = engine.batcher.intake
    held, most = intake.load, intake.capacity
    return QueueView(
        stats.running, stats.waiting, intake.num_unfinished, limit, shown, held.sequences, held.tokens, most.tokens,
        tuple(map(_request, intake.oldest(MAX_REQUESTS_SHOWN))),
    )  # fmt: skip


def _request(request: Request) -> RequestView:
    states = {sequence.status.value for sequence in request.sequences}
    return RequestView(
        id=request.request_id,
        state=next((state for state in ("running", "loading", "forking") if state in states), "waiting"),
        prompt_tokens=len(request.prompt_token_ids),
        generated_tokens=sum(len(sequence.output_token_ids) for sequence in request.sequences),
        age_seconds=round(time.monotonic() - request.submitted_s, 3),
    )


def batcher_view(engine: ModelEngine | None, service: ServiceState) -> BatcherView:
    """`/api/batcher/stats`."""
    stats = engine.batcher.stats if engine is not None else BatcherStats()
    hits = stats.hit_tokens / stats.queried_tokens if stats.queried_tokens else 0.0
    return view_of(
        BatcherView,
        stats,
        tokens_per_second=round(stats.tokens_per_s, 2),
        generated_tokens=stats.total_tokens,
        prefix_hit_rate=round(hits, 4),
        kv_blocks={"total": stats.blocks_total, "free": stats.blocks_free, "cached": stats.blocks_cached},
        max_batch_size=service.settings.engine.max_batch_size,
        latency=service.latency(),
    )


def model_views(engine: ModelEngine | None) -> tuple[AvailableModel, ...]:
    """`/api/models`: the loaded model, and those that could be loaded by name."""
    found = available_models()
    if engine is None:
        return tuple(found)
    path = str(engine.model.path)
    loaded = AvailableModel(engine.model.name, path, Checkpoint(engine.model.path).total_bytes, loaded=True)
    return (loaded, *(model for model in found if model.path != path))
