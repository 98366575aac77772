"""Everything about a load that is decided before a byte is allocated: what the model costs, where it goes, how fast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from core.batching.cohorts import CohortPolicy, FixedCohorts, OneCohort, PredictedCohorts
from core.config import Settings
from core.costs import (
    DeviceProfile,
    LayerCosts,
    LinkProfile,
    LinkTopology,
    PlacementDevice,
    PlacementPlan,
    PlacementProblem,
    StagePlan,
    StageTimer,
    emulated_profile,
)
from core.costs.cards import gpu_spec, lacks_bf16
from core.devices import (
    HOST,
    Device,
    DeviceBudget,
    MainMemory,
    format_bytes,
    host_device,
    open_devices,
    open_main_memory,
)
from core.engine.memory_advice import MemoryAdvice
from core.errors import ContextLengthError, InsufficientMemoryError
from core.execution.attention.select import check_heads, planned_gathering, planned_packing
from core.models.architecture import Architecture, read_architecture
from core.models.dtype import fit_dtype, served_architecture
from core.models.resolve import ResolvedModel, resolve_model
from core.models.stage_model import ModelBytes, measure_bytes
from core.placement.engine import parse_layers, stage_costs
from core.placement.pooled import PooledKV, place_pooled, pool_of
from core.placement.predict import DeviceEffect, Prediction, one_more, predict
from core.placement.streaming import place_or_stream, place_streaming
from core.profiling.profiler import LayerProfiler
from core.profiling.workspace import Workspace, measure_workspace
from core.transfer import TransferManager

DATASHEET_LINK = LinkProfile(11.6e9, 30e-6, "staged", "assumed")
"""Between two cards of a plan without a machine: staged through host memory over PCIe 4.0 x8, a common board's."""

_MIN_KV_TOKENS = 512
_SAMPLING_BYTES = 64
MIN_LOCAL_BLOCKS = 16
"""What is being written is local, so a stage needs some blocks of its own even where others lend it memory."""

_CPU_KV_SHARE = 4
_ANY_MACHINE_BYTES = 1 << 60


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A load as planned. `problem` is what placement worked from; `prediction` is there if its speeds are known;
    `pooled` is the KV that devices hold together; `host` is there if layers stay in main memory; `notes` say where the
    model is served otherwise than its checkpoint says.
    """

    resolved: ResolvedModel
    architecture: Architecture
    weights: ModelBytes
    problem: PlacementProblem
    placement: PlacementPlan
    devices: tuple[Device, ...]
    max_model_len: int
    prediction: Prediction | None
    pooled: PooledKV
    host: Device | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_measured(self) -> bool:
        return self.prediction is not None

    @property
    def costs(self) -> LayerCosts:
        return self.problem.costs


def layer_costs(
    architecture: Architecture, weights: ModelBytes, settings: Settings, attention_bytes: int = 0
) -> LayerCosts:
    """Bytes per part, with room for the activations of the largest step, and what attention takes beside them."""
    element = architecture.dtype.itemsize
    workspace = _workspace(architecture, weights, settings)
    return LayerCosts(
        embedding_bytes=weights.embedding,
        layer_bytes=weights.layers,
        after_bytes=weights.after,
        head_bytes=weights.head,
        tied=weights.tied,
        kv_bytes_per_token=tuple(shape.bytes_per_token(element) for shape in architecture.kv_shapes),
        workspace_bytes=workspace.layers_bytes + attention_bytes,
        head_workspace_bytes=workspace.head_bytes,
        layer_flops=tuple(
            int(2 * (count - (weights.layers[layer] - weights.read_bytes(layer, 1)) / element))
            for layer, count in enumerate(weights.layer_parameters)
        ),
        head_flops=2 * weights.head_parameters,
        hidden_bytes=architecture.hidden_size * element,
        experts=weights.experts,
    )


def _scratch_bytes(devices: Sequence[Device], settings: Settings, architecture: Architecture) -> int:
    """The page that rows write to which pad a GPU's steps: at most one block of all layers."""
    if not any(device.is_gpu for device in devices):
        return 0
    element = architecture.dtype.itemsize
    return settings.engine.block_size * sum(shape.bytes_per_token(element) for shape in architecture.kv_shapes)


def _workspace(architecture: Architecture, weights: ModelBytes, settings: Settings) -> Workspace:
    """As measured; for models that cannot be, what a Llama of their sizes takes, twice."""
    tokens = settings.engine.max_num_batched_tokens
    rows = min(settings.engine.max_batch_size, tokens)
    measured = measure_workspace(architecture, tokens, rows, weights.experts)
    if measured is not None:
        return measured
    config = architecture.config.get_text_config()
    inner = int(getattr(config, "intermediate_size", None) or 4 * architecture.hidden_size)
    per_token = 2 * (8 * architecture.hidden_size + 3 * inner) * architecture.dtype.itemsize
    return Workspace(tokens * per_token, rows * architecture.vocab_size * _SAMPLING_BYTES)


def plan_model(
    resolved: ResolvedModel, devices: Sequence[Device], settings: Settings, measure: LayerProfiler,
    host: Device | None = None,
) -> ModelPlan:  # fmt: skip
    """Read the config, count the parts on `meta` and place them. Allocates nothing that outlives the call.

    `measure` is asked where the plan depends on speeds: with more than one device, unless another placement and the
    number of cohorts are set. The speed of emulated devices is known anyway. `host` is main memory for layers that do
    not fit on the devices; None refuses such models.
    Raises `UnsupportedModelError`, `CheckpointError`, `InsufficientMemoryError`, `ContextLengthError`,
    `InvalidRequestError` for a strategy or layers that do not exist.
    """
    architecture, notes = served_architecture(resolved.path, settings.model.dtype, devices)
    weights = measure_bytes(architecture, planned_packing(devices, settings, architecture.dtype))
    max_model_len = _max_model_len(resolved, architecture, settings)
    placed = settings.devices
    by_hand = settings.engine.cohorts is not None and placed.placement != "profiled"
    is_emulated = all(device.speed is not None for device in devices)
    is_measured = is_emulated or (len(devices) > 1 and not by_hand)
    # Where nothing is measured, speeds decide nothing.
    assumed = tuple(DeviceProfile(device.name, 1e11, ((1, 1e13),), source="assumed") for device in devices)
    profiles = measure.devices(devices, architecture) if is_measured else assumed
    links = measure.links(devices) if is_measured else LinkTopology()
    request = plan_request(
        resolved.name,
        architecture,
        weights,
        settings,
        max_model_len,
        tuple(
            PlacementDevice(device.name, device.memory_limit_bytes, profile)
            for device, profile in zip(devices, profiles, strict=True)
        ),
        links,
        shares_cpu=placed.devices is None and any(device.is_main_memory for device in devices),
        attention_bytes=planned_gathering(devices, settings, architecture, max_model_len)
        + _scratch_bytes(devices, settings, architecture),
    )
    lend_ratio = _lend_ratio(settings)
    try:
        placement = place_pooled(request, placed.placement, lend_ratio if is_measured else 0.0, max_model_len)
        pooled = pool_devices(placement, request, settings, max_model_len)
    except InsufficientMemoryError as refused:
        if host is None or host.memory_limit_bytes <= 0:
            raise _advised(refused, request, settings, max_model_len) from refused
        if not is_measured and not by_hand:
            measured = zip(request.devices, measure.devices(devices, architecture), strict=True)
            request = replace(request, devices=tuple(replace(each, profile=profile) for each, profile in measured))
            is_measured = True
        request = _with_host(request, host.memory_limit_bytes, measure.host_links(devices) if is_measured else {})
        request = replace(request, min_kv_tokens=_least_kv_tokens(settings, max_model_len, request.max_kv_tokens))
        try:
            placement = place_streaming(request, placed.placement)
            pooled = pool_devices(placement, request, settings, max_model_len)
        except InsufficientMemoryError as error:
            raise _advised(error, request, settings, max_model_len) from error
    check_heads(devices, {stage.device_name for stage in placement.stages}, architecture)
    prediction = predict(placement, request, pooled=pooled) if is_measured else None
    return ModelPlan(
        resolved, architecture, weights, request, placement, tuple(devices), max_model_len, prediction, pooled,
        host if placement.streamed_bytes else None, notes,
    )  # fmt: skip


def pool_devices(
    placement: PlacementPlan, request: PlacementProblem, settings: Settings, max_model_len: int
) -> PooledKV:
    """The KV that the placement offers with what devices lend each other."""
    pooled = pool_of(request, placement, _lend_ratio(settings))
    least = _least_kv_tokens(settings, max_model_len, request.max_kv_tokens)
    if pooled.tokens < least:
        per_token = sum(request.costs.kv_bytes_per_token)
        lacking = (least - pooled.tokens) * per_token
        raise InsufficientMemoryError(
            f"{request.model_name} does not fit with a KV cache of {least} tokens: the devices hold {pooled.tokens} "
            f"tokens together, and lack {format_bytes(lacking)}.",
            lacking_bytes={stage.device_name: lacking for stage in placement.stages[:1]},
        )
    return pooled


def _advised(
    error: InsufficientMemoryError, request: PlacementProblem, settings: Settings, max_model_len: int
) -> InsufficientMemoryError:
    """The error with what would fit."""
    least = _least_kv_tokens(settings, max_model_len, request.max_kv_tokens)
    return MemoryAdvice(request, settings, _lend_ratio(settings), least).added_to(error)


def _lend_ratio(settings: Settings) -> float:
    return settings.lending.lend_ratio if settings.lending.enabled else 0.0


def _least_kv_tokens(settings: Settings, max_model_len: int, wanted: int) -> int:
    """KV that a load must have room for: the longest prompt and answer that is asked for, or a modest one."""
    return min(wanted, settings.model.max_model_len or min(max_model_len, _MIN_KV_TOKENS))


def _with_host(
    request: PlacementProblem, host_bytes: int, links: Mapping[tuple[str, str], LinkProfile]
) -> PlacementProblem:
    """Layers may stay in so many bytes of main memory, and stream in over these links."""
    known = request.links
    return replace(request, host_bytes=host_bytes, links=LinkTopology({**known.links, **links}, known.default))


def plan_request(
    name: str, architecture: Architecture, weights: ModelBytes, settings: Settings, max_model_len: int,
    devices: tuple[PlacementDevice, ...], links: LinkTopology, *, shares_cpu: bool = False, attention_bytes: int = 0,
) -> PlacementProblem:  # fmt: skip
    """What the settings ask of placement. `shares_cpu`: a CPU device may take what others leave, so KV is bounded."""
    engine, placed = settings.engine, settings.devices
    costs = layer_costs(architecture, weights, settings, attention_bytes)
    most = engine.max_batch_size * max_model_len
    wanted = engine.kv_cache_tokens or (_kv_cap(costs, devices, most) if shares_cpu else most)
    least = _least_kv_tokens(settings, max_model_len, wanted)
    if settings.lending.enabled and len(devices) > 1:
        least = min(least, MIN_LOCAL_BLOCKS * engine.block_size)  # the rest may be lent; `pool_devices` checks it
    return PlacementProblem(
        model_name=name,
        costs=costs,
        devices=devices,
        links=links,
        objective=placed.objective,
        streams=min(placed.plan_streams, engine.max_batch_size),
        context=min(placed.plan_context, max_model_len),
        min_kv_tokens=least,
        max_kv_tokens=wanted,
        block_size=engine.block_size,
        layers=parse_layers(placed.layers) if placed.layers is not None else None,
    )


def measure_with(settings: Settings, transfer: TransferManager) -> LayerProfiler:
    """Measures devices and links, or finds what was measured before."""
    threads = settings.devices.cpu_threads or torch.get_num_threads()
    return LayerProfiler(settings, transfer, threads, budget_s=settings.devices.profile_seconds)


def host_for(
    settings: Settings, devices: Sequence[Device], main: MainMemory, leaving: DeviceBudget | None = None
) -> Device | None:
    """Main memory for layers that do not fit on `devices`; None if they may not stream in. `leaving` is the part of an
    engine that will be closed before."""
    if settings.devices.stream_weights == "off":
        return None
    return host_device(max(0, main.room_bytes(devices, leaving) - promised_bytes(settings)))


def promised_bytes(settings: Settings) -> int:
    """Main memory that the settings give to KV."""
    return (settings.memory.host_bytes or 0) + (settings.lending.host_bytes or 0)


@dataclass(frozen=True, slots=True)
class Preview:
    """A placement that nothing was loaded for, and the KV that its devices hold together. Without known speeds there is
    no `prediction`."""

    problem: PlacementProblem
    placement: PlacementPlan
    pooled: PooledKV
    prediction: Prediction | None
    one_more: tuple[DeviceEffect, ...] = ()
    notes: tuple[str, ...] = ()


def preview(settings: Settings, gpus: Sequence[str] = (), *, more: Sequence[str] = ()) -> Preview:
    """Where `settings.model` would go, from its config alone: on this machine, or on the cards that `gpus` describes
    (see `core.costs.cards.gpu_spec`). `more`: what each of these would bring on top; for described cards that is
    one more of each, unless others are named. Raises what a load would.
    """
    resolved = resolve_model(settings.model.name, settings.model.revision)
    if gpus:
        cards, links = gpu_spec(*gpus), LinkTopology(default=DATASHEET_LINK)
        lacking = [device.name for device in cards if lacks_bf16(device)]
        asked = settings.model.dtype
        architecture, notes = fit_dtype(read_architecture(resolved.path, asked), asked, lacking)
        length = _max_model_len(resolved, architecture, settings)
        request = plan_request(resolved.name, architecture, measure_bytes(architecture), settings, length, cards, links)
        if settings.devices.stream_weights == "auto":
            request = _with_host(request, _ANY_MACHINE_BYTES, {})
        try:
            placement = place_or_stream(request, settings.devices.placement, _lend_ratio(settings), length)
        except InsufficientMemoryError as error:
            raise _advised(error, request, settings, length) from error
        pooled = pool_of(request, placement, _lend_ratio(settings))
        prediction: Prediction | None = predict(placement, request, pooled=pooled)
    else:
        devices = open_devices(settings.devices, allocate=False, set_aside_bytes=promised_bytes(settings))
        measure = measure_with(settings, TransferManager())
        host = host_for(settings, devices, open_main_memory(settings.devices))
        plan = plan_model(resolved, devices, settings, measure, host)
        request, placement, pooled, prediction = plan.problem, plan.placement, plan.pooled, plan.prediction
        notes = plan.notes
    others = more or tuple(dict.fromkeys(text.partition("*")[0].strip() for text in gpus))
    effects = tuple(one_more(placement, request, device) for device in gpu_spec(*others)) if prediction else ()
    return Preview(request, placement, pooled, prediction, effects, notes)


def _max_model_len(resolved: ResolvedModel, architecture: Architecture, settings: Settings) -> int:
    asked = settings.model.max_model_len
    if asked is not None and asked > architecture.max_position:
        raise ContextLengthError(
            f"max_model_len {asked} is more than the {architecture.max_position} positions of {resolved.name}.",
            param="max_model_len",
        )
    return asked or architecture.max_position


def _kv_cap(costs: LayerCosts, devices: Sequence[PlacementDevice], most_tokens: int) -> int:
    """No more KV than a full batch can use, nor than a quarter of the memory."""
    per_token = max(1, sum(costs.kv_bytes_per_token))
    share = sum(device.limit_bytes for device in devices) // _CPU_KV_SHARE
    return max(_MIN_KV_TOKENS, min(most_tokens, share // per_token))


def cohort_policy(plan: ModelPlan, settings: Settings) -> CohortPolicy:
    """One stage: one step at a time. Otherwise as set, or by prediction where the devices' speeds are known."""
    stages, engine = plan.placement.stages, settings.engine
    chunk = engine.max_num_batched_tokens
    if len(stages) == 1 or engine.cohorts == 1:
        return OneCohort(chunk)
    if engine.cohorts is not None or not plan.is_measured:
        return FixedCohorts(len(stages), engine.cohorts or len(stages), chunk)
    return PredictedCohorts(plan.costs, stage_costs(plan.placement, plan.problem), plan.problem.links, max_chunk=chunk)


def stage_timer(plan: ModelPlan, stage: StagePlan) -> StageTimer | None:
    """What predicts a stage's time; None where its device's speed is not known."""
    device = plan.devices[stage.device_index]
    profile = plan.problem.devices[stage.device_index].profile
    if device.speed is not None:
        profile = emulated_profile(device.name, device.speed.bandwidth_bytes_s, device.speed.flops)
    elif not plan.is_measured:
        return None
    link, parts = plan.problem.links.link(HOST, device.name), 1
    if profile.sharing is not None:
        sharing = [stage.device.sharing for stage in stage_costs(plan.placement, plan.problem)]
        parts = sum(other is not None and other.processor == profile.sharing.processor for other in sharing)
    return StageTimer(plan.costs, profile, stage.first_layer, stage.last_layer, stage.streamed_layers, link, parts)
