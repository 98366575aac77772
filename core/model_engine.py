"""One loaded model: its devices' budgets, stages, blocks and the batcher that drives them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.batching.batcher import ContinuousBatcher
from core.batching.breaker import CircuitBreaker
from core.batching.cohorts import CohortPolicy, FixedCohorts, OneCohort, PredictedCohorts
from core.batching.scheduler import Scheduler, SchedulerLimits
from core.config import Settings
from core.devices import Device, DeviceBudget, parse_link
from core.errors import CheckpointError, ContextLengthError, InvalidRequestError
from core.execution.attention.select import LinearAdapter, select_attention
from core.execution.model_runner import ModelRunner
from core.execution.native import do_all_products
from core.execution.stage import Stage
from core.execution.threads import CpuThreads
from core.kv_cache.manager import KVCacheManager
from core.models.architecture import Architecture, read_architecture
from core.models.checkpoint import Checkpoint
from core.models.resolve import ResolvedModel
from core.models.stage_model import ModelBytes, StageSlice, measure_bytes
from core.models.tokenizer import Tokenizer
from core.placement import (
    LayerCosts,
    LinkProfile,
    LinkTopology,
    PlacementPlan,
    StageCost,
    emulated_profile,
    split_by_memory,
)
from core.transfer import TransferManager

ProgressCall = Callable[[int, int], None]

_MIN_KV_TOKENS = 512
_CPU_KV_SHARE = 4
_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What clients may know of the model being served. `max_model_len` is the longest prompt plus answer: the context,
    or all of the KV cache if that is smaller.
    """

    name: str
    aliases: tuple[str, ...]
    path: Path
    created: int
    max_model_len: int
    vocab_size: int
    dtype: str
    num_parameters: int
    eos_token_ids: tuple[int, ...]
    generation_defaults: dict[str, Any]
    tokenizer: Tokenizer

    def knows(self, name: str) -> bool:
        """Whether clients may call the model by this name."""
        return name == self.name or name in self.aliases


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """Everything about a load that is known before a byte is allocated."""

    resolved: ResolvedModel
    architecture: Architecture
    weights: ModelBytes
    costs: LayerCosts
    placement: PlacementPlan
    devices: tuple[Device, ...]
    max_model_len: int


class LoadProgress:
    """Adds up bytes read by several threads."""

    def __init__(self, total: int, report: ProgressCall | None) -> None:
        self._total = total
        self._report = report
        self._done = 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            if self._report is not None:
                self._report(self._done, self._total)


def layer_costs(architecture: Architecture, weights: ModelBytes, settings: Settings) -> LayerCosts:
    """Bytes per part, with room for the activations of the largest step."""
    element = torch.empty((), dtype=architecture.dtype).element_size()
    config = architecture.config.get_text_config()
    inner = int(getattr(config, "intermediate_size", None) or 4 * architecture.hidden_size)
    tokens = settings.engine.max_num_batched_tokens
    return LayerCosts(
        embedding_bytes=weights.embedding,
        layer_bytes=weights.layers,
        after_bytes=weights.after,
        head_bytes=weights.head,
        tied=weights.tied,
        kv_bytes_per_token=tuple(shape.bytes_per_token(element) for shape in architecture.kv_shapes),
        workspace_bytes=tokens * (8 * architecture.hidden_size + 3 * inner) * element,
        head_workspace_bytes=settings.engine.max_batch_size * architecture.vocab_size * 8,
        layer_flops=tuple(2 * nbytes // element for nbytes in weights.layers),
        head_flops=2 * weights.head // element,
        hidden_bytes=architecture.hidden_size * element,
    )


def plan_model(resolved: ResolvedModel, devices: Sequence[Device], settings: Settings) -> ModelPlan:
    """Read the config, measure the parts on `meta` and place them. Allocates nothing.

    Raises `UnsupportedModelError`, `CheckpointError`, `InsufficientMemoryError`, `ContextLengthError`.
    """
    architecture = read_architecture(resolved.path, settings.model.dtype)
    weights = measure_bytes(architecture)
    asked = settings.model.max_model_len
    if asked is not None and asked > architecture.max_position:
        raise ContextLengthError(
            f"max_model_len {asked} is more than the {architecture.max_position} positions of {resolved.name}.",
            param="max_model_len",
        )
    max_model_len = asked or architecture.max_position
    costs = layer_costs(architecture, weights, settings)
    engine = settings.engine
    wanted = engine.kv_cache_tokens or _kv_cap(costs, devices, engine.max_batch_size * max_model_len, settings)
    placement = split_by_memory(
        costs,
        [(device.name, device.memory_limit_bytes) for device in devices],
        model_name=resolved.name,
        min_kv_tokens=min(wanted, asked or min(max_model_len, _MIN_KV_TOKENS)),
        max_kv_tokens=wanted,
        block_size=engine.block_size,
    )
    return ModelPlan(resolved, architecture, weights, costs, placement, tuple(devices), max_model_len)


def _kv_cap(costs: LayerCosts, devices: Sequence[Device], most_tokens: int, settings: Settings) -> int:
    """No more KV than a full batch can use; where the CPU has no limit set, no more than a quarter of its memory."""
    if settings.devices.devices is None and any(device.kind == "cpu" for device in devices):
        per_token = max(1, sum(costs.kv_bytes_per_token))
        share = sum(device.memory_limit_bytes for device in devices) // _CPU_KV_SHARE
        return max(_MIN_KV_TOKENS, min(most_tokens, share // per_token))
    return most_tokens


@dataclass(slots=True)
class ModelEngine:
    """A model that is loaded and running. Made by `load_engine`; `close` frees everything."""

    model: LoadedModel
    plan: ModelPlan
    settings: Settings
    budgets: dict[str, DeviceBudget]
    stages: list[Stage]
    transfer: TransferManager
    runner: ModelRunner
    kv: KVCacheManager
    batcher: ContinuousBatcher
    backends: tuple[str, ...]
    load_s: float = 0.0
    produced_token: bool = field(default=False)
    started_s: float = field(default_factory=time.monotonic)

    @property
    def alive_s(self) -> float:
        """Seconds since the engine started."""
        return time.monotonic() - self.started_s

    def torch_threads(self, cpu_threads: int) -> int:
        """Threads for torch's own operations in the engine thread.

        One, where the native kernels do all products: torch's idle OpenMP threads spin for milliseconds after each of
        its operations and would take the cores from the kernels' threads. In fp32, and on processors that multiply
        bf16 in hardware, torch does the larger products.
        """
        return 1 if _products_are_native(self.backends, self.plan) else cpu_threads

    def check_invariants(self) -> None:
        """Audit blocks and budgets. Call it while the engine is idle."""
        self.batcher.call(self.batcher.scheduler.check_invariants).result()
        for budget in self.budgets.values():
            budget.check_invariants()

    def close(self, *, drain_s: float = 0.0) -> None:
        """Stop the batcher and give all memory back."""
        self.batcher.stop(drain_s=drain_s)
        self.runner.close()
        for stage in self.stages:
            stage.free()
        for budget in self.budgets.values():
            budget.release("workspace")


def load_engine(
    plan: ModelPlan,
    settings: Settings,
    *,
    transfer: TransferManager,
    cpu_threads: int,
    on_read: Callable[[int], None] = lambda nbytes: None,
) -> ModelEngine:
    """Load a planned model and start its batcher. On failure everything allocated so far is freed."""
    started_s = time.perf_counter()
    tokenizer = Tokenizer.from_directory(plan.resolved.path, _chat_template(settings))
    budgets = {device.name: DeviceBudget(device) for device in plan.devices}
    stages: list[Stage] = []
    backends: list[str] = []
    kinds = [plan.devices[stage.device_index].kind for stage in plan.placement.stages]
    threads = CpuThreads(cpu_threads, sum(kind in ("cpu", "sim") for kind in kinds))
    try:
        for stage_plan in plan.placement.stages:
            device = plan.devices[stage_plan.device_index]
            part = StageSlice(stage_plan.first_layer, stage_plan.last_layer, plan.architecture.num_layers)
            stage = Stage(plan.architecture, part, device, budgets[device.name], plan.costs)
            stages.append(stage)
            attention, adapter = select_attention(device, settings, threads)
            stage.load(plan.resolved.path, stage_plan.weight_bytes, on_read, adapter or _no_adapter)
            budgets[device.name].reserve("workspace", stage_plan.workspace_bytes)
            blocks = plan.placement.kv_tokens // settings.engine.block_size
            stage.allocate_kv(blocks, settings.engine.block_size, attention)
            backends.append(attention.name)
    except BaseException:
        for stage in stages:
            stage.free()
        raise
    return _assemble(plan, settings, budgets, stages, transfer, tokenizer, backends, threads, started_s)


def _no_adapter(model: nn.Module) -> None:
    """Devices whose modules are used as they are."""


def _assemble(
    plan: ModelPlan,
    settings: Settings,
    budgets: dict[str, DeviceBudget],
    stages: list[Stage],
    transfer: TransferManager,
    tokenizer: Tokenizer,
    backends: list[str],
    threads: CpuThreads,
    started_s: float,
) -> ModelEngine:
    engine = settings.engine
    model = _describe(plan, settings, tokenizer)
    salt = f"{model.path}:{plan.resolved.revision}:{model.dtype}".encode()
    kv = KVCacheManager(
        plan.placement.kv_tokens // engine.block_size,
        engine.block_size,
        salt=salt,
        enable_prefix_caching=engine.enable_prefix_caching,
    )
    torch_threads = 1 if _products_are_native(backends, plan) else threads.together
    runner = ModelRunner(stages, transfer, plan.architecture.vocab_size, engine.block_size, threads, torch_threads)
    limits = SchedulerLimits(
        engine.max_batch_size,
        engine.max_num_batched_tokens,
        engine.prefill_chunk_size or engine.max_num_batched_tokens,
        model.max_model_len,
    )
    breaker = CircuitBreaker(engine.breaker_failures, engine.breaker_reset_s)
    batcher = ContinuousBatcher(
        runner,
        Scheduler(kv, limits),
        tokenizer,
        max_queue=engine.max_queue,
        breaker=breaker,
        policy=_cohort_policy(plan, settings),
    )
    batcher.start()
    return ModelEngine(
        model, plan, settings, budgets, stages, transfer, runner, kv, batcher, tuple(backends),
        load_s=time.perf_counter() - started_s,
    )  # fmt: skip


def _products_are_native(backends: Sequence[str], plan: ModelPlan) -> bool:
    return all(name == "native" for name in backends) and do_all_products(plan.architecture.dtype)


def _cohort_policy(plan: ModelPlan, settings: Settings) -> CohortPolicy:
    """One stage: one step at a time. Otherwise as set, or by prediction where the devices' speeds are known."""
    stages, chunk = plan.placement.stages, settings.engine.max_num_batched_tokens
    if len(stages) == 1 or settings.engine.cohorts == 1:
        return OneCohort(chunk)
    if settings.engine.cohorts is not None:
        return FixedCohorts(len(stages), settings.engine.cohorts, chunk)
    devices = [plan.devices[stage.device_index] for stage in stages]
    if any(device.speed is None for device in devices):
        return FixedCohorts(len(stages), len(stages), chunk)
    costs = []
    for stage, device in zip(stages, devices, strict=True):
        assert device.speed is not None
        profile = emulated_profile(device.name, device.speed.bandwidth_bytes_s, device.speed.flops)
        costs.append(StageCost(profile, stage.first_layer, stage.last_layer))
    return PredictedCohorts(plan.costs, costs, emulated_links(settings), max_chunk=chunk)


def emulated_links(settings: Settings) -> LinkTopology:
    """What `devices.sim_link` says of the links between emulated devices."""
    if settings.devices.sim_link is None:
        return LinkTopology()
    speed = parse_link(settings.devices.sim_link)
    return LinkTopology(default=LinkProfile(speed.bandwidth_bytes_s, speed.latency_s, "copy", "emulated"))


def _chat_template(settings: Settings) -> str | None:
    path = settings.model.chat_template
    return path.read_text(encoding="utf-8") if path is not None else None


def _describe(plan: ModelPlan, settings: Settings, tokenizer: Tokenizer) -> LoadedModel:
    generation = _generation_config(plan.resolved.path)
    eos = generation.get("eos_token_id", getattr(plan.architecture.config, "eos_token_id", None))
    ids = eos if isinstance(eos, list) else [eos]
    if tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    vocab = plan.architecture.vocab_size
    return LoadedModel(
        name=plan.resolved.name,
        aliases=settings.model.served_model_name,
        path=plan.resolved.path,
        created=int(time.time()),
        max_model_len=min(plan.max_model_len, plan.placement.kv_tokens),
        vocab_size=vocab,
        dtype=str(plan.architecture.dtype).removeprefix("torch."),
        num_parameters=plan.weights.num_parameters,
        eos_token_ids=tuple(sorted({int(token) for token in ids if token is not None and 0 <= int(token) < vocab})),
        generation_defaults={name: generation[name] for name in _SAMPLING_DEFAULTS if generation.get(name) is not None},
        tokenizer=tokenizer,
    )


def _generation_config(path: Path) -> dict[str, Any]:
    """`generation_config.json`; without `do_sample` its temperature and the like have no effect in transformers."""
    file = path / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        loaded = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"generation_config.json of {path.name} is damaged: {error}") from error
    return loaded if isinstance(loaded, dict) else {}


def check_prompt(tokens: Sequence[object], model: LoadedModel, *, reserve: int = 1) -> None:
    """A prompt has tokens, all of them in the vocabulary, and leaves room for `reserve` more."""
    if not tokens:
        raise InvalidRequestError("The prompt is empty.", param="prompt")
    vocab = model.vocab_size
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab:
            raise InvalidRequestError(
                f"Token ids must be integers from 0 to {vocab - 1}, got {token!r}.", param="prompt"
            )
    if len(tokens) + reserve > model.max_model_len:
        raise ContextLengthError(
            f"This model's context holds {model.max_model_len} tokens, but the prompt has {len(tokens)}.",
            param="prompt",
        )


def checkpoint_bytes(path: Path) -> int:
    """Bytes of a checkpoint's safetensors files; also checks that they are there."""
    return Checkpoint(path).total_bytes


__all__ = [
    "LinearAdapter",
    "LoadProgress",
    "LoadedModel",
    "ModelEngine",
    "ModelPlan",
    "ProgressCall",
    "check_prompt",
    "checkpoint_bytes",
    "layer_costs",
    "load_engine",
    "plan_model",
]
