"""One loaded model: its devices' budgets, stages, blocks and the batcher that drives them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from core.batching.batcher import ContinuousBatcher
from core.cluster.lent_memory import LentMemories
from core.config import Settings
from core.devices import HOST, DeviceBudget, MainMemory
from core.engine.kv_memory import KVMemory
from core.engine.model_plan import ModelPlan
from core.engine.stages import EngineStage
from core.engine.submission import LoadedModel
from core.errors import UnsupportedParameterError, VRAMancerError
from core.execution.model_runner import ModelRunner
from core.execution.native import covers, do_all_products
from core.grammars.compiler import Grammars
from core.kv_cache.manager import KVCacheManager
from core.logs import get_logger
from core.models.generation import eos_of, read_generation
from core.models.tokenizer import Tokenizer
from core.parsers.families import recognise
from core.placement.predict import predict_rate
from core.transfer import TransferManager

logger = get_logger(__name__)
KEEP_S = 10.0
"""For writing down, when the engine ends, what only the devices have."""
ProgressCall = Callable[[int, int], None]


@dataclass(slots=True)
class ModelEngine:
    """A model that is loaded and running. Made by `EngineBuilder`; `close` frees everything."""

    model: LoadedModel
    plan: ModelPlan
    settings: Settings
    budgets: dict[str, DeviceBudget]
    stages: list[EngineStage]
    transfer: TransferManager
    main_memory: MainMemory
    runner: ModelRunner
    memory: KVMemory
    batcher: ContinuousBatcher
    backends: tuple[str, ...]
    lent: LentMemories | None = None
    load_s: float = 0.0
    produced_token: bool = field(default=False)
    started_s: float = field(default_factory=time.monotonic)
    _predicted_tok_s: dict[int, float] = field(default_factory=dict)

    @property
    def kv(self) -> KVCacheManager:
        """Blocks and block tables; the engine thread's."""
        return self.memory.kv

    @property
    def alive_s(self) -> float:
        """Seconds since the engine started."""
        return time.monotonic() - self.started_s

    def predicted_tok_s(self, streams: int) -> float:
        """Tokens a second that the cost model expects of the placement; computed once for each number of streams."""
        if streams not in self._predicted_tok_s:
            plan = self.plan
            rate = predict_rate(plan.placement, plan.problem, streams, plan.problem.context, plan.pooled)
            self._predicted_tok_s[streams] = rate.tok_s
        return self._predicted_tok_s[streams]

    def torch_threads(self, cpu_threads: int) -> int:
        """Threads for torch's own operations in the engine thread.

        One, where the native kernels do all products: torch's idle OpenMP threads spin for milliseconds after each of
        its operations and would take the cores from the kernels' threads. In fp32, and on processors that multiply
        bf16 in hardware, torch does the larger products.
        """
        return 1 if products_are_native(self.backends, self.plan, self.settings) else cpu_threads

    def check_invariants(self) -> None:
        """Audit blocks and budgets. Call it while the engine is idle."""
        self.batcher.intake.call_within(self.batcher.scheduler.check_invariants)
        for budget in self.budgets.values():
            budget.check_invariants()

    def open_lasting(self) -> None:
        """Keep blocks from now on where they outlast the engine, too. Call it, in any thread, once no other engine has
        these places."""
        self.memory.below.open_lasting(self.settings.memory, self.memory.salt, self.lent)

    def close(self, *, drain_s: float = 0.0, reason: VRAMancerError | None = None) -> None:
        """Stop the batcher, keep what tiers can keep, and give all memory back. Requests that have not finished after
        `drain_s`, or come later, are told the `reason`."""
        self.batcher.stop(drain_s=drain_s, reason=reason)
        if self.memory.tiers is not None and self.batcher.error is None:
            try:
                self.memory.tiers.keep(self.batcher.move_pages, KEEP_S)
            except Exception as error:  # noqa: BLE001  everything has to be given back whatever it was
                logger.warning("blocks were not kept", reason=repr(error))
        self.free()

    def free(self) -> None:
        """Give all memory back. The batcher has ended, or is parked with its requests. Safe to call twice."""
        self.runner.close()
        for stage in self.stages:
            stage.free()
        self.memory.close()
        for budget in self.budgets.values():
            budget.release("workspace")
        self.main_memory.close(self.budgets[HOST])


def products_are_native(backends: Sequence[str], plan: ModelPlan, settings: Settings) -> bool:
    """Whether torch has no larger products to compute here."""
    quantization = plan.architecture.quantization
    if quantization is not None and not all(covers(each.form, each.k) for each in quantization.modules.values()):
        return False
    instructions = settings.engine.cpu_instructions
    placed = zip(backends, plan.placement.stages, strict=True)
    here = [name for name, stage in placed if plan.devices[stage.device_index].is_here]
    return all(name == "native" for name in here) and do_all_products(plan.architecture.dtype, instructions)


def end_tokens(plan: ModelPlan, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end an answer, in order."""
    vocab = plan.architecture.vocab_size
    generation = read_generation(plan.resolved.path, vocab)
    ids = {*eos_of(plan.architecture.config, vocab, generation), tokenizer.eos_token_id}
    return tuple(sorted(token for token in ids if token is not None and 0 <= token < vocab))


def grammars_of(plan: ModelPlan, tokenizer: Tokenizer) -> Grammars | None:
    """What answers of a model can keep to; None if they cannot."""
    try:
        return tokenizer.grammars(end_tokens(plan, tokenizer))
    except UnsupportedParameterError:
        return None


def describe(plan: ModelPlan, settings: Settings, tokenizer: Tokenizer) -> LoadedModel:
    """What clients may know of a model that has been loaded as planned."""
    vocab = plan.architecture.vocab_size
    generation = read_generation(plan.resolved.path, vocab)
    return LoadedModel(
        name=plan.resolved.name,
        aliases=settings.model.served_model_name,
        path=plan.resolved.path,
        created=int(time.time()),
        max_model_len=min(plan.max_model_len, plan.pooled.tokens),
        vocab_size=vocab,
        dtype=str(plan.architecture.dtype).removeprefix("torch."),
        num_parameters=plan.weights.num_parameters,
        eos_token_ids=end_tokens(plan, tokenizer),
        generation_defaults=dict(generation.defaults),
        tokenizer=tokenizer,
        source=settings.model.name or "",
        quantization=plan.architecture.quantization.title if plan.architecture.quantization is not None else "",
        weight_bytes=plan.weights.total,
        output_format=recognise(
            tokenizer.template_source,
            tokenizer.special_tokens,
            tokenizer.added_tokens,
            tool_parser=settings.model.tool_parser,
            reasoning_parser=settings.model.reasoning_parser,
        ),
    )
