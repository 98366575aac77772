"""What settings ask of placement, and when a plan holds enough KV. Pure: also for cards that are not here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from core.config import Settings
from core.costs import (
    LayerCosts,
    LinkProfile,
    LinkTopology,
    PlacementDevice,
    PlacementPlan,
    PlacementProblem,
)
from core.devices.device import HOST, format_bytes, machine_of
from core.errors import ContextLengthError, InsufficientMemoryError
from core.placement.engine import parse_layers
from core.placement.pooled import PooledKV, place_pooled, pool_of

MIN_LOCAL_BLOCKS = 16
"""What is being written is local, so a stage needs some blocks of its own even where others lend it memory."""

_MIN_KV_TOKENS = 512
_CPU_KV_SHARE = 4


def make_problem(
    name: str, costs: LayerCosts, settings: Settings, max_model_len: int, devices: tuple[PlacementDevice, ...],
    links: LinkTopology, *, shares_cpu: bool = False,
) -> PlacementProblem:  # fmt: skip
    """What the settings ask of placement. `shares_cpu`: a CPU device may take what others leave, so KV is bounded."""
    engine, placed = settings.engine, settings.devices
    most = engine.max_batch_size * max_model_len
    wanted = engine.kv_cache_tokens or (_kv_cap(costs, devices, most) if shares_cpu else most)
    least = least_kv_tokens(settings, max_model_len, wanted)
    far_blocks = settings.lending.extent_blocks if _lends_far(settings, devices, links) else 0
    if settings.lending.enabled and (any_neighbours(devices) or far_blocks):
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
        far_extent_blocks=far_blocks,
    )


def place_resident(
    problem: PlacementProblem, settings: Settings, max_model_len: int, lending: float
) -> tuple[PlacementPlan, PooledKV]:
    """A plan whose layers all stay on their devices, and the KV that these hold together. `lending` is the share that
    devices lend as far as speeds are known. Raises `InsufficientMemoryError`.

    Where a plan counts on lent memory that nobody has, as where a device is alone in its machine, each stage has to
    hold all KV itself.
    """
    strategy = settings.devices.placement
    try:
        placement = place_pooled(problem, strategy, lending, max_model_len)
        return placement, pool_devices(placement, problem, settings, max_model_len)
    except InsufficientMemoryError as refused:
        least = least_kv_tokens(settings, max_model_len, problem.max_kv_tokens)
        if least == problem.min_kv_tokens or len({machine_of(device.name) for device in problem.devices}) == 1:
            raise
        alone = replace(problem, min_kv_tokens=least)
        try:
            placement = place_pooled(alone, strategy, lending, max_model_len)
        except InsufficientMemoryError:
            raise refused from None
        return placement, pool_devices(placement, alone, settings, max_model_len)


def pool_devices(
    placement: PlacementPlan, problem: PlacementProblem, settings: Settings, max_model_len: int
) -> PooledKV:
    """The KV that the placement offers with what devices lend each other."""
    pooled = pool_of(problem, placement, lend_ratio(settings))
    least = least_kv_tokens(settings, max_model_len, problem.max_kv_tokens)
    if pooled.tokens < least:
        per_token = sum(problem.costs.kv_bytes_per_token)
        lacking = (least - pooled.tokens) * per_token
        raise InsufficientMemoryError(
            f"{problem.model_name} does not fit with a KV cache of {least} tokens: the devices hold {pooled.tokens} "
            f"tokens together, and lack {format_bytes(lacking)}.",
            lacking_bytes={stage.device_name: lacking for stage in placement.stages[:1]},
        )
    return pooled


def any_neighbours(devices: Sequence[PlacementDevice]) -> bool:
    """Whether some device has another beside it, in the same machine."""
    machines = [machine_of(device.name) for device in devices]
    return len(set(machines)) < len(machines)


def _lends_far(settings: Settings, devices: Sequence[PlacementDevice], links: LinkTopology) -> bool:
    """Whether a device may lend to those of other machines, if that is worth its cost: which has to have been
    measured."""
    several = len({machine_of(device.name) for device in devices}) > 1
    return settings.lending.enabled and settings.lending.between_machines and several and bool(links.links)


def with_hosts(
    problem: PlacementProblem, hosts: Mapping[str, int], links: Mapping[tuple[str, str], LinkProfile]
) -> PlacementProblem:
    """Layers may stay in so many bytes of each machine's main memory, by its name, and stream in over these links."""
    return replace(
        problem, host_bytes=hosts.get(HOST, 0),
        node_host_bytes={machine_of(host): nbytes for host, nbytes in hosts.items() if host != HOST},
        links=replace(problem.links, links={**problem.links.links, **links}),
    )  # fmt: skip


def lend_ratio(settings: Settings) -> float:
    """The share of a lender's free memory that others may use; 0 where nobody lends."""
    return settings.lending.lend_ratio if settings.lending.enabled else 0.0


def least_kv_tokens(settings: Settings, max_model_len: int, wanted: int) -> int:
    """KV that a load must have room for: the longest prompt and answer that is asked for, or a modest one."""
    return min(wanted, settings.model.max_model_len or min(max_model_len, _MIN_KV_TOKENS))


def served_length(name: str, max_position: int, settings: Settings) -> int:
    """The longest sequence, prompt and answer. Raises `ContextLengthError` for more than the model's positions."""
    asked = settings.model.max_model_len
    if asked is not None and asked > max_position:
        raise ContextLengthError(
            f"max_model_len {asked} is more than the {max_position} positions of {name}.",
            param="max_model_len",
        )
    return asked or max_position


def _kv_cap(costs: LayerCosts, devices: Sequence[PlacementDevice], most_tokens: int) -> int:
    """No more KV than a full batch can use, nor than a quarter of the memory."""
    per_token = max(1, sum(costs.kv_bytes_per_token))
    share = sum(device.limit_bytes for device in devices) // _CPU_KV_SHARE
    return max(_MIN_KV_TOKENS, min(most_tokens, share // per_token))
