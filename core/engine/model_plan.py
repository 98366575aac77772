"""Everything about a load that is decided before a byte is allocated: what the model costs, where it goes, how fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from core.batching.cohorts import CohortPolicy, FixedCohorts, OneCohort, PredictedCohorts
from core.config import Settings
from core.costs import (
    DeviceProfile,
    LayerCosts,
    LinkProfile,
    LinkTopology,
    ModelBytes,
    PlacementDevice,
    PlacementPlan,
    PlacementProblem,
    StagePlan,
    StageTimer,
    Workspace,
    emulated_profile,
)
from core.costs.model import costs_of
from core.devices import HOST, Device, DeviceBudget, MainMemory, host_device, host_of, open_devices, open_main_memory
from core.engine.memory_advice import advised
from core.engine.problem import (
    least_kv_tokens,
    lend_ratio,
    make_problem,
    place_resident,
    pool_devices,
    served_length,
    with_hosts,
)
from core.errors import InsufficientMemoryError
from core.execution.attention.select import check_heads, planned_gathering, planned_packing
from core.models.architecture import Architecture, read_architecture
from core.models.dtype import fit_dtype, served_architecture
from core.models.resolve import ResolvedModel
from core.models.stage_model import measure_bytes
from core.placement.engine import stage_costs
from core.placement.pooled import PooledKV
from core.placement.predict import Prediction, predict
from core.placement.streaming import place_streaming
from core.profiling.profiler import LayerProfiler
from core.profiling.workspace import measure_workspace
from core.quantization.choice import QuantizeChoice
from core.transfer import TransferManager

_SAMPLING_BYTES = 64
"""Per row and token of the vocabulary, where it cannot be measured."""


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A load as planned. `problem` is what placement worked from; `prediction` is there if its speeds are known;
    `pooled` is the KV that devices hold together; `host` is there if layers stay in this machine's main memory;
    `node_hosts` is the main memory of the other machines whose devices are used; `notes` say where the model is served
    otherwise than its checkpoint says.
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
    node_hosts: tuple[Device, ...] = ()

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
    return costs_of(
        weights, _workspace(architecture, weights, settings),
        [shape.bytes_per_token(element) for shape in architecture.kv_shapes], architecture.hidden_size, element,
        attention_bytes,
    )  # fmt: skip


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
    resolved: ResolvedModel, devices: Sequence[Device], settings: Settings, measure: Measures,
    host: Device | None = None, node_hosts: Sequence[Device] = (),
) -> ModelPlan:  # fmt: skip
    """Read the config, count the parts on `meta` and place them. Allocates nothing that outlives the call.

    `measure` is asked where the plan depends on speeds: with more than one device, or where machines may join, unless
    another placement and the number of cohorts are set. The speed of emulated devices is known anyway. `host` is main
    memory for layers that do not fit on the devices, `node_hosts` is that of other machines; None refuses such models.
    Raises `UnsupportedModelError`, `CheckpointError`, `InsufficientMemoryError`, `ContextLengthError`,
    `InvalidRequestError` for a strategy or layers that do not exist.
    """
    architecture, notes = served_architecture(
        resolved.path, settings.model.dtype, devices, QuantizeChoice.of(settings.model)
    )
    weights = measure_bytes(architecture, planned_packing(devices, settings, architecture.dtype))
    max_model_len = served_length(resolved.name, architecture.max_position, settings)
    placed = settings.devices
    by_hand = settings.engine.cohorts is not None and placed.placement != "profiled"
    is_emulated = all(device.speed is not None for device in devices)
    several = len(devices) > 1 or settings.cluster.accept  # what a machine that joins is good for is told beside this
    is_measured = is_emulated or (several and not by_hand)
    # Where nothing is measured, speeds decide nothing.
    assumed = tuple(DeviceProfile(device.name, 1e11, ((1, 1e13),), source="assumed") for device in devices)
    profiles = measure.devices(devices, architecture) if is_measured else assumed
    links = measure.links(devices) if is_measured else LinkTopology()
    scratch = planned_gathering(devices, settings, architecture, max_model_len)
    scratch += _scratch_bytes(devices, settings, architecture)
    request = make_problem(
        resolved.name, layer_costs(architecture, weights, settings, scratch), settings, max_model_len,
        tuple(
            PlacementDevice(device.name, device.memory_limit_bytes, profile)
            for device, profile in zip(devices, profiles, strict=True)
        ),
        links,
        shares_cpu=placed.devices is None and any(device.is_main_memory for device in devices),
    )  # fmt: skip
    rooms = {each.name: each.memory_limit_bytes for each in (host, *node_hosts) if each is not None}
    try:
        placement, pooled = place_resident(
            request, settings, max_model_len, lend_ratio(settings) if is_measured else 0.0
        )
    except InsufficientMemoryError as refused:
        if host is None or not any(nbytes > 0 for nbytes in rooms.values()):
            raise advised(refused, request, settings, max_model_len) from refused
        if not is_measured and not by_hand:
            measured = zip(request.devices, measure.devices(devices, architecture), strict=True)
            request = replace(request, devices=tuple(replace(each, profile=profile) for each, profile in measured))
            is_measured = True
        request = with_hosts(request, rooms, measure.host_links(devices) if is_measured else {})
        request = replace(request, min_kv_tokens=least_kv_tokens(settings, max_model_len, request.max_kv_tokens))
        try:
            placement = place_streaming(request, placed.placement)
            pooled = pool_devices(placement, request, settings, max_model_len)
        except InsufficientMemoryError as error:
            raise advised(error, request, settings, max_model_len) from error
    check_heads(devices, {stage.device_name for stage in placement.stages}, architecture)
    prediction = predict(placement, request, pooled=pooled) if is_measured else None
    return ModelPlan(
        resolved, architecture, weights, request, placement, tuple(devices), max_model_len, prediction, pooled,
        host if HOST in placement.streamed_by_host() else None, notes, tuple(node_hosts),
    )  # fmt: skip


class Measures(Protocol):
    """What tells speeds; `LayerProfiler` those of this machine."""

    def devices(self, devices: Sequence[Device], architecture: Architecture) -> tuple[DeviceProfile, ...]: ...

    def links(self, devices: Sequence[Device]) -> LinkTopology: ...

    def host_links(self, devices: Sequence[Device]) -> dict[tuple[str, str], LinkProfile]: ...


def lends(plan: ModelPlan, settings: Settings) -> bool:
    """Whether devices of a machine lend each other memory."""
    return settings.lending.enabled


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


def plan_here(resolved: ResolvedModel, settings: Settings) -> ModelPlan:
    """A model on the devices of this machine, of which none of the memory is taken. Raises what a load would."""
    devices = open_devices(settings.devices, allocate=False, set_aside_bytes=promised_bytes(settings))
    host = host_for(settings, devices, open_main_memory(settings.devices))
    return plan_model(resolved, devices, settings, measure_with(settings, TransferManager()), host)


def described_model(
    resolved: ResolvedModel, settings: Settings, lacking: Sequence[str]
) -> tuple[Architecture, ModelBytes, LayerCosts, tuple[str, ...]]:
    """A model for cards that are not here, some of them `lacking` bf16: its architecture in the dtype that they can
    serve, its bytes and costs, and what there is to say of it."""
    asked = settings.model.dtype
    architecture, notes = fit_dtype(
        read_architecture(resolved.path, asked, QuantizeChoice.of(settings.model)), asked, lacking
    )
    weights = measure_bytes(architecture)
    return architecture, weights, layer_costs(architecture, weights, settings), notes


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
    link, parts = plan.problem.links.link(host_of(device.name), device.name), 1
    if profile.sharing is not None:
        sharing = [stage.device.sharing for stage in stage_costs(plan.placement, plan.problem)]
        parts = sum(other is not None and other.processor == profile.sharing.processor for other in sharing)
    return StageTimer(plan.costs, profile, stage.first_layer, stage.last_layer, stage.streamed_layers, link, parts)
