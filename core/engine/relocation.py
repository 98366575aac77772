"""Moving a running model to other devices or cuts, while its requests go on.

::

    serving on the old stages |            | parked  | serving on the new ones
    weights that fit beside   |============|         |
    the rest, if any          |            |====     |        old KV given up first
    pages, one token produced |            |    ==   |
    requests taken over       |            |      =  |        with the KV of their full blocks

Stages that stay on their device share the weights they have. Where the old engine had to make room, or has lost a
device, KV is computed again, prompts and answers alike. Where everything fits beside the old engine, its requests
are parked for as long as it takes to hand them over; otherwise while what lacks room is read. If anything fails, the
old engine goes on: as it is, or, if it had to make room, loaded anew with all its requests. Tiers that outlast the
process are the new engine's once the old one has ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from core.devices import HOST
from core.engine.builder import EngineBuilder, check_memory
from core.engine.carrying import Carrier
from core.engine.model_engine import ModelEngine
from core.engine.model_plan import ModelPlan
from core.errors import ConflictError, ModelNotLoadedError
from core.execution.stage import Stage
from core.logs import get_logger
from core.models.shared_parts import SharedParts, joins_tied_ends
from core.models.stage_model import StageSlice

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PlacedStage:
    """A stage of the new placement. `layers` are its first and last. Of its weights, `kept_bytes` are on the device
    already and `read_bytes` have to be read; `beside`: while the old placement serves."""

    device: str
    layers: tuple[int, int]
    weight_bytes: int
    kept_bytes: int
    read_bytes: int
    beside: bool


@dataclass(frozen=True, slots=True)
class Relocation:
    """What a re-placement does, or would do. Tokens per second by number of streams, None where speeds are not known.

    Attributes:
        kv_tokens: that the new placement holds.
        moved_layers: that are on another device than before.
        estimated_seconds: to read what has to be read, at the rate of the last load, and to compute again what requests
            have; `estimated_pause_seconds` of it while no request goes on.
        seconds, pause_seconds: what it took; None for a dry run.
        carried_kv_tokens: whose KV did not have to be computed again; None for a dry run.
    """

    dry_run: bool
    strategy: str
    stages: tuple[PlacedStage, ...]
    unused_devices: tuple[str, ...]
    kv_tokens: int
    tokens_per_second: Mapping[int, float] | None
    read_bytes: int
    kept_bytes: int
    moved_layers: int
    estimated_seconds: float
    estimated_pause_seconds: float
    seconds: float | None = None
    pause_seconds: float | None = None
    carried_kv_tokens: int | None = None


@dataclass(slots=True)
class Relocator:
    """Moves what runs in `old` to where `plan` says. `make_builder` begins an engine for a plan; `start` brings a built
    one to its first token; `switch` makes it the one that is served."""

    old: ModelEngine
    plan: ModelPlan
    make_builder: Callable[[ModelPlan], EngineBuilder]
    start: Callable[[ModelEngine], None]
    switch: Callable[[ModelEngine], None]
    lost: frozenset[str] = frozenset()
    _parts: dict[int, SharedParts] = field(default_factory=dict)

    # -- what there is to do ----------------------------------------------------------------------------------------

    def outlook(self) -> Relocation:
        """What would be done."""
        plan, costs = self.plan, self.plan.costs
        stages = []
        for placed in plan.placement.stages:
            kept = 0
            wanted = StageSlice(placed.first_layer, placed.last_layer, costs.num_layers)
            for old in (stage.part for stage in self._donors(placed.device_name)):
                common = range(max(old.first, wanted.first), min(old.last, wanted.last))
                kept += sum(costs.layer_bytes[layer] for layer in common)
                if joins_tied_ends(old, wanted, tied=costs.tied):
                    continue
                kept += costs.embedding_bytes if old.is_first and wanted.is_first else 0
                if old.is_last and wanted.is_last:
                    kept += costs.after_bytes + (0 if costs.tied and old.is_first else costs.head_bytes)
            kept = min(kept, placed.weight_bytes)
            beside = self._free_beside(placed.device_name) + kept >= placed.weight_bytes
            layers = (placed.first_layer, placed.last_layer - 1)
            read = placed.weight_bytes - kept
            stages.append(PlacedStage(placed.device_name, layers, placed.weight_bytes, kept, read, beside))
        rates = plan.prediction.rates if plan.prediction is not None else None
        read_bytes = sum(stage.read_bytes for stage in stages)
        late_bytes = sum(stage.read_bytes for stage in stages if not stage.beside)
        again_s = self._recompute_s()
        return Relocation(
            dry_run=True,
            strategy=plan.placement.strategy,
            stages=tuple(stages),
            unused_devices=plan.placement.unused_devices,
            kv_tokens=plan.pooled.tokens,
            tokens_per_second=None if rates is None else {rate.streams: round(rate.tok_s, 2) for rate in rates},
            read_bytes=read_bytes,
            kept_bytes=sum(stage.kept_bytes for stage in stages),
            moved_layers=sum(_home(self.old.plan, layer) != _home(plan, layer) for layer in range(costs.num_layers)),
            estimated_seconds=round(self._reading_s(read_bytes) + again_s, 3),
            estimated_pause_seconds=round(self._reading_s(late_bytes) + again_s, 3),
        )

    def _donors(self, device: str) -> list[Stage]:
        """Stages whose weights can be shared: of this machine."""
        here = [stage for stage in self.old.stages if isinstance(stage, Stage)]
        return [stage for stage in here if stage.device.name == device and device not in self.lost]

    def _free_beside(self, device: str) -> int:
        limit = next(each.memory_limit_bytes for each in self.plan.devices if each.name == device)
        budget = self.old.budgets.get(device)
        return limit - (budget.used_bytes if budget is not None and device not in self.lost else 0)

    def _reading_s(self, nbytes: int) -> float:
        """At the rate at which the model was loaded."""
        loaded = sum(stage.weight_bytes for stage in self.old.stages)
        return nbytes * self.old.load_s / max(1, loaded)

    def _recompute_s(self) -> float:
        stats, token_s = self.old.batcher.stats, self.old.kv.running.prefill_token_s
        used = (stats.blocks_total - stats.blocks_free) * self.old.kv.block_size
        return used * token_s if token_s is not None else 0.0

    # -- doing it ---------------------------------------------------------------------------------------------------

    def run(self) -> Relocation:
        """Raises what loading raises, and `ConflictError` if a request would no longer fit; then nothing changes."""
        began_s, outlook = time.perf_counter(), self.outlook()
        check_memory(self.plan, {name: budget.used_bytes for name, budget in self.old.budgets.items() if name != HOST})
        builder = self.make_builder(self.plan)
        engine: ModelEngine | None = None
        try:
            self._load_beside(builder)
            if self._all_fits(builder):
                engine = builder.finish()
                self.start(engine)
        except BaseException:
            _discard(engine, builder)
            raise
        parked_s = time.perf_counter()
        self.old.batcher.park()
        try:
            self._check_lengths(engine)
        except BaseException:
            self.old.batcher.resume()
            _discard(engine, builder)
            raise
        beside = engine is not None
        if engine is None:
            engine = self._finish_alone(builder)
        carried = self._hand_over(engine, carry=beside and not self.lost)
        ended_s = time.perf_counter()
        self.old.close()
        builder.previous_gone()
        engine.open_lasting()
        pause_s = ended_s - parked_s
        logger.info("the model has moved", pause_s=round(pause_s, 3), stages=[s.device for s in outlook.stages])
        return replace(
            outlook, dry_run=False, seconds=round(ended_s - began_s, 3), pause_seconds=round(pause_s, 3),
            carried_kv_tokens=carried,
        )  # fmt: skip

    def _load_beside(self, builder: EngineBuilder) -> None:
        """The weights that fit beside what the old engine has. Shared ones count once."""
        for index, placed in enumerate(self.plan.placement.stages):
            for stage in self._donors(placed.device_name):
                self._parts[index] = stage.share(builder.resident_of(index), builder.adapter_of(index))
        shared = {self.plan.placement.stages[index].device_name: parts.nbytes for index, parts in self._parts.items()}
        for name, budget in self.old.budgets.items():
            if name != HOST and name in builder.budgets and name not in self.lost:
                held = max(0, budget.used_bytes - shared.get(name, 0))
                builder.hold_previous(name, min(held, builder.budgets[name].free_bytes))  # its limit may be lower now
        for index, placed in enumerate(self.plan.placement.stages):
            if builder.budgets[placed.device_name].free_bytes >= placed.weight_bytes and not placed.streamed_layers:
                builder.load_stage(index, self._parts.pop(index, None))

    def _all_fits(self, builder: EngineBuilder) -> bool:
        """Whether pages and workspace fit beside the old engine too."""
        plan = self.plan
        return len(builder.stages) == len(plan.placement.stages) and all(
            builder.budgets[placed.device_name].free_bytes
            >= placed.workspace_bytes + placed.kv_bytes_per_token * tokens
            for placed, tokens in zip(plan.placement.stages, plan.pooled.local_tokens, strict=True)
        )

    def _check_lengths(self, engine: ModelEngine | None) -> None:
        room = min(self.plan.max_model_len, self.plan.pooled.tokens) if engine is None else engine.model.max_model_len
        longest = self.old.batcher.longest_request()
        if longest > room:
            raise ConflictError(
                f"A running request may come to {longest} tokens, and the new placement holds {room}; try again later."
            )

    def _finish_alone(self, builder: EngineBuilder) -> ModelEngine:
        """The old engine makes room for the rest. If that fails it is built again, and gets its requests back."""
        self.old.free()
        builder.previous_gone()
        engine: ModelEngine | None = None
        try:
            for index in range(len(self.plan.placement.stages)):
                if index not in builder.stages:
                    builder.load_stage(index, self._parts.pop(index, None))
            engine = builder.finish()
            self.start(engine)
        except BaseException as error:
            self._restore(engine, builder, error)
            raise
        return engine

    def _restore(self, engine: ModelEngine | None, failed: EngineBuilder, error: BaseException) -> None:
        logger.warning("the model could not be moved; it goes on where it was", reason=repr(error))
        again = self.make_builder(self.old.plan)
        restored: ModelEngine | None = None
        try:
            for index in range(len(self.old.plan.placement.stages)):
                device = again.device_of(index).name
                here = [stage for stage in failed.stages.values() if isinstance(stage, Stage)]
                donors = [stage for stage in here if stage.device.name == device and stage.is_loaded]
                parts = [stage.share(again.resident_of(index), again.adapter_of(index)) for stage in donors]
                for stage in failed.stages.values():
                    if stage.device.name == device:
                        stage.free()
                again.load_stage(index, parts[0] if parts else None)
            _discard(engine, failed)
            restored = again.finish()
            self.start(restored)
        except BaseException as failure:  # noqa: BLE001  whatever it was, clients are told
            _discard(restored, again)
            reason = ModelNotLoadedError(
                f"The model was moved, which failed ({error}), and so did going back: {failure}"
            )
            self.old.batcher.stop(reason=reason)
            raise reason from error
        self._hand_over(restored, carry=False)
        restored.open_lasting()

    def _hand_over(self, engine: ModelEngine, *, carry: bool) -> int:
        """Requests go on in another engine, which is the same model to its clients; with what KV the old one still has,
        if that is to be taken along. Returns the tokens that it was."""
        model = self.old.model
        engine.model = replace(engine.model, created=model.created)
        self.switch(engine)
        carrier = Carrier(self.old, engine, self._recompute_s() or None) if carry else None

        def take_over() -> int:
            carried = carrier.run() if carrier is not None else 0
            engine.batcher.adopt(self.old.batcher)
            return carried

        return engine.batcher.call(take_over).result()


def _home(plan: ModelPlan, layer: int) -> str:
    """The device that has a layer."""
    return next(
        stage.device_name for stage in plan.placement.stages if layer in range(stage.first_layer, stage.last_layer)
    )


def _discard(engine: ModelEngine | None, builder: EngineBuilder) -> None:
    """Give back what was made."""
    if engine is not None:
        engine.close()
    builder.free()
