"""One loaded model: its devices' budgets, stages, blocks and the batcher that drives them."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.batching.batcher import ContinuousBatcher
from core.batching.breaker import CircuitBreaker
from core.batching.scheduler import Scheduler, SchedulerLimits
from core.config import Settings
from core.config_schema import EngineSettings
from core.costs import StagePlan
from core.devices import HOST, Device, DeviceBudget
from core.devices.memory import free_bytes_of
from core.emulation.guest_time import GuestTime
from core.engine.kv_memory import KVMemory, lending_host, open_kv
from core.engine.model_plan import ModelPlan, cohort_policy, stage_timer
from core.errors import (
    CheckpointError,
    ContextLengthError,
    InsufficientMemoryError,
    InvalidRequestError,
    VRAMancerError,
)
from core.execution.attention.select import AttentionBackends
from core.execution.model_runner import ModelRunner
from core.execution.native import do_all_products
from core.execution.stage import Stage
from core.execution.threads import CpuThreads
from core.kv_cache.manager import KVCacheManager
from core.logs import get_logger
from core.models.checkpoint import Checkpoint, weights_digest
from core.models.stage_model import StageSlice
from core.models.tokenizer import Tokenizer
from core.streaming.stream import SLOTS, StreamedLayers
from core.transfer import TransferManager

logger = get_logger(__name__)
KEEP_S = 10.0
"""For writing down, when the engine ends, what only the devices have."""
ProgressCall = Callable[[int, int], None]

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
    memory: KVMemory
    batcher: ContinuousBatcher
    backends: tuple[str, ...]
    load_s: float = 0.0
    produced_token: bool = field(default=False)
    started_s: float = field(default_factory=time.monotonic)

    @property
    def kv(self) -> KVCacheManager:
        """Blocks and block tables; the engine thread's."""
        return self.memory.kv

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
        self.batcher.call_within(self.batcher.scheduler.check_invariants)
        for budget in self.budgets.values():
            budget.check_invariants()

    def open_lasting(self) -> None:
        """Use the tiers that outlast the process. Call it once no other engine has them."""
        self.memory.open_lasting(self.settings.memory)

    def close(self, *, drain_s: float = 0.0, reason: VRAMancerError | None = None) -> None:
        """Stop the batcher, keep what tiers can keep, and give all memory back. Requests that have not finished after
        `drain_s`, or come later, are told the `reason`."""
        self.batcher.stop(drain_s=drain_s, reason=reason)
        if self.memory.tiers is not None and self.batcher.error is None:
            try:
                self.memory.tiers.keep(self.batcher.move_pages, KEEP_S)
            except Exception as error:  # noqa: BLE001  everything has to be given back whatever it was
                logger.warning("blocks were not kept", reason=repr(error))
        self.runner.close()
        for stage in self.stages:
            stage.free()
        self.memory.close()
        for budget in self.budgets.values():
            budget.release("workspace")


def check_memory(plan: ModelPlan) -> None:
    """Raise `InsufficientMemoryError` if the devices no longer have the memory that the plan counts on, because
    something else took it since."""
    needed: dict[str, int] = defaultdict(int)
    for stage, local_tokens in zip(plan.placement.stages, plan.pooled.local_tokens, strict=True):
        device = plan.devices[stage.device_index]
        kv_bytes = stage.kv_bytes_per_token * local_tokens
        needed[device.torch_device] += stage.weight_bytes + kv_bytes + stage.workspace_bytes
    devices = plan.devices
    if plan.host is not None:
        devices = (*devices, plan.host)
        needed[plan.host.torch_device] += plan.placement.streamed_bytes
    free = {device.torch_device: free_bytes_of(device) for device in devices}
    lacking = {name: nbytes - free[name] for name, nbytes in needed.items() if nbytes > free[name]}
    if lacking:
        listed = ", ".join(f"{name} has {free[name]} bytes free, {nbytes} too few" for name, nbytes in lacking.items())
        raise InsufficientMemoryError(
            f"Since the placement was planned, other programs have taken memory: {listed}.", lacking_bytes=lacking
        )


def load_engine(
    plan: ModelPlan,
    settings: Settings,
    *,
    transfer: TransferManager,
    cpu_threads: int,
    on_read: Callable[[int], None] = lambda nbytes: None,
) -> ModelEngine:
    """Load a planned model and start its batcher, without the tiers that outlast the process. On failure everything
    allocated so far is freed.

    Raises `InsufficientMemoryError`, before anything is allocated, if memory was taken since the plan was made.
    """
    started_s = time.perf_counter()
    check_memory(plan)
    tokenizer = Tokenizer.from_directory(plan.resolved.path, _chat_template(settings))
    budgets = {device.name: DeviceBudget(device) for device in plan.devices}
    if plan.host is not None:
        budgets[HOST] = DeviceBudget(plan.host)
    stages: list[Stage] = []
    names: list[str] = []
    host = lending_host(settings)
    kinds = [plan.devices[stage.device_index].kind for stage in plan.placement.stages]
    threads = CpuThreads(cpu_threads, sum(kind in ("cpu", "sim") for kind in kinds))
    backends, guests = AttentionBackends(settings, threads), GuestTime()
    try:
        for stage_plan in plan.placement.stages:
            device = plan.devices[stage_plan.device_index]
            part = StageSlice(stage_plan.first_layer, stage_plan.last_layer, plan.architecture.num_layers)
            stage = Stage(plan.architecture, part, device, budgets[device.name], stage_timer(plan, stage_plan))
            stages.append(stage)
            attention, adapter = backends.of(device)
            streamed = _streamed_layers(stage_plan, budgets, transfer)
            resident = stage_plan.weight_bytes - SLOTS * stage_plan.slot_bytes
            stage.load(plan.resolved.path, resident, on_read, adapter, streamed)
            budgets[device.name].reserve("workspace", stage_plan.workspace_bytes)
            pages = plan.pooled.local_tokens[len(stages) - 1] // settings.engine.block_size
            stage.allocate_kv(pages, settings.engine.block_size, backends, transfer, host, guests)
            names.append(attention.name)
        return _assemble(plan, settings, budgets, stages, transfer, tokenizer, names, threads, host, started_s)
    except BaseException:
        for stage in stages:
            stage.free()
        raise


def _streamed_layers(
    stage: StagePlan, budgets: Mapping[str, DeviceBudget], transfer: TransferManager
) -> StreamedLayers | None:
    if not stage.streamed_layers:
        return None
    return StreamedLayers(stage.streamed_layers, stage.streamed_bytes, stage.slot_bytes, budgets[HOST], transfer)


def _assemble(
    plan: ModelPlan,
    settings: Settings,
    budgets: dict[str, DeviceBudget],
    stages: list[Stage],
    transfer: TransferManager,
    tokenizer: Tokenizer,
    backends: list[str],
    threads: CpuThreads,
    host: Device,
    started_s: float,
) -> ModelEngine:
    engine = settings.engine
    model = _describe(plan, settings, tokenizer)
    salt = f"{model.path}:{plan.resolved.revision or weights_digest(model.path)}:{model.dtype}".encode()
    memory = open_kv(plan, settings, stages, budgets, host, salt)
    try:
        torch_threads = 1 if _products_are_native(backends, plan) else threads.together
        runner = ModelRunner(stages, transfer, plan.architecture.vocab_size, engine.block_size, threads, torch_threads)
        limits = _limits(engine, memory.kv, model.max_model_len)
        breaker = CircuitBreaker(engine.breaker_failures, engine.breaker_reset_s)
        batcher = ContinuousBatcher(
            runner,
            Scheduler(memory.kv, limits),
            tokenizer,
            max_queue=engine.max_queue,
            breaker=breaker,
            policy=cohort_policy(plan, settings),
        )
        batcher.start()
        return ModelEngine(
            model, plan, settings, budgets, stages, transfer, runner, memory, batcher, tuple(backends),
            load_s=time.perf_counter() - started_s,
        )  # fmt: skip
    except BaseException:
        memory.close()
        raise


def _limits(engine: EngineSettings, kv: KVCacheManager, max_model_len: int) -> SchedulerLimits:
    """As set; where a stage has few pages of its own, no more than half of them for the blocks that sequences are
    in the middle of, and half for what a step writes."""
    half = kv.writable_blocks // 2
    tokens = engine.max_num_batched_tokens
    if not kv.pages.is_trivial:
        tokens = min(tokens, half * engine.block_size)
    batch = engine.max_batch_size if kv.pages.is_trivial else min(engine.max_batch_size, half)
    return SchedulerLimits(batch, tokens, min(tokens, engine.prefill_chunk_size or tokens), max_model_len)


def _products_are_native(backends: Sequence[str], plan: ModelPlan) -> bool:
    return all(name == "native" for name in backends) and do_all_products(plan.architecture.dtype)


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
        max_model_len=min(plan.max_model_len, plan.pooled.tokens),
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
