"""A placement that nothing is loaded for. On cards by name, a model of a known family needs neither torch nor
transformers for it; so what does is imported where it is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from core.config import Settings
from core.costs import LayerCosts, LinkTopology, PlacementDevice, PlacementPlan, PlacementProblem
from core.costs.card_notes import card_notes, lacks_bf16
from core.costs.cards import gpu_spec
from core.costs.model import costs_of
from core.costs.profile import DATASHEET_LINK
from core.costs.room import usable
from core.devices.device import HOST
from core.engine.memory_advice import advised
from core.engine.problem import lend_ratio, make_problem, pool_devices, served_length, with_hosts
from core.errors import InsufficientMemoryError
from core.models.families import read_family
from core.models.resolve import ResolvedModel, resolve_model
from core.models.served_dtype import ELEMENT_BYTES, choose_dtype
from core.placement.pooled import PooledKV
from core.placement.predict import DeviceEffect, Prediction, one_more, predict
from core.placement.streaming import place_or_stream
from core.quantization.choice import QuantizeChoice

_ANY_MACHINE_BYTES = 1 << 60


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """Of the model that is planned for: `dtype` it would be served in, the longest sequence, prompt and answer, and how
    its weights are quantized, if they are."""

    num_parameters: int
    dtype: str
    max_model_len: int
    quantization: str = ""


@dataclass(frozen=True, slots=True)
class Preview:
    """A placement that nothing was loaded for, and the KV that its devices hold together. Without known speeds there is
    no `prediction`. `reserved_bytes` of each device are kept for drivers and screens."""

    model: PlannedModel
    problem: PlacementProblem
    placement: PlacementPlan
    pooled: PooledKV
    prediction: Prediction | None
    one_more: tuple[DeviceEffect, ...] = ()
    notes: tuple[str, ...] = ()
    reserved_bytes: tuple[int, ...] = ()


def preview(settings: Settings, gpus: Sequence[str] = (), *, more: Sequence[str] = ()) -> Preview:
    """Where `settings.model` would go, from its config alone: on this machine, or on the cards that `gpus` describes
    (see `core.costs.cards.gpu_spec`). `more`: what each of these would bring on top; for described cards that is
    one more of each, unless others are named. Raises what a load would.
    """
    resolved = resolve_model(
        settings.model.name, settings.model.revision, config_only=True, cache_dir=settings.runtime.cache_dir
    )
    cards = gpu_spec(*gpus)
    shown = _on_cards(resolved, settings, cards) if cards else _on_this_machine(resolved, settings)
    others = more or tuple(dict.fromkeys(text.partition("*")[0].strip() for text in gpus))
    added = gpu_spec(*others) if shown.prediction is not None else ()
    effects = tuple(one_more(shown.placement, shown.problem, usable(device)) for device in added)
    notes = card_notes((*cards, *added), serves_fp16=shown.model.dtype == "float16")
    return replace(shown, one_more=effects, notes=shown.notes + notes)


def _on_cards(resolved: ResolvedModel, settings: Settings, nominal: tuple[PlacementDevice, ...]) -> Preview:
    cards = tuple(map(usable, nominal))
    model, costs, notes = _describe(resolved, settings, nominal)
    links, length = LinkTopology(default=DATASHEET_LINK), model.max_model_len
    problem = make_problem(resolved.name, costs, settings, length, cards, links)
    if settings.devices.stream_weights == "auto":
        problem = with_hosts(problem, {HOST: _ANY_MACHINE_BYTES}, {})
    try:
        placement = place_or_stream(problem, settings.devices.placement, lend_ratio(settings), length)
        pooled = pool_devices(placement, problem, settings, length)
    except InsufficientMemoryError as error:
        raise advised(error, problem, settings, length) from error
    reserved = tuple(card.limit_bytes - kept.limit_bytes for card, kept in zip(nominal, cards, strict=True))
    prediction = predict(placement, problem, pooled=pooled)
    return Preview(model, problem, placement, pooled, prediction, notes=notes, reserved_bytes=reserved)


def _describe(
    resolved: ResolvedModel, settings: Settings, cards: Sequence[PlacementDevice]
) -> tuple[PlannedModel, LayerCosts, tuple[str, ...]]:
    """A model on cards: by the arithmetic of its family, else from its class."""
    lacking, engine = [card.name for card in cards if lacks_bf16(card)], settings.engine
    quantize = QuantizeChoice.of(settings.model)
    family, title = read_family(resolved.path, settings.model.dtype, quantize), quantize.title
    if family is None:
        from core.engine.model_plan import described_model

        architecture, weights, costs, notes = described_model(resolved, settings, lacking)
        dtype, most = str(architecture.dtype).removeprefix("torch."), architecture.max_position
        title = architecture.quantization.title if architecture.quantization is not None else ""
    else:
        dtype, notes = choose_dtype(family.dtype, settings.model.dtype, lacking)
        weights, most = family.weights(dtype), family.max_position
        tokens = engine.max_num_batched_tokens
        workspace = family.workspace(dtype, tokens, min(engine.max_batch_size, tokens))
        costs = costs_of(weights, workspace, family.kv_bytes_per_token(dtype), family.hidden_size, ELEMENT_BYTES[dtype])
    model = PlannedModel(weights.num_parameters, dtype, served_length(resolved.name, most, settings), title)
    return model, costs, notes


def _on_this_machine(resolved: ResolvedModel, settings: Settings) -> Preview:
    from core.engine.model_plan import plan_here

    plan = plan_here(resolved, settings)
    dtype = str(plan.architecture.dtype).removeprefix("torch.")
    quantized = plan.architecture.quantization
    title = quantized.title if quantized is not None else ""
    model = PlannedModel(plan.weights.num_parameters, dtype, plan.max_model_len, title)
    return Preview(
        model, plan.problem, plan.placement, plan.pooled, plan.prediction, notes=plan.notes,
        reserved_bytes=(0,) * len(plan.devices),
    )  # fmt: skip
