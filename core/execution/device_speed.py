"""A device's profile from short real runs, repeated in rounds: what disturbs one second does not decide a number."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from statistics import median

import torch

from core.devices import Device, format_bytes
from core.execution import measure
from core.execution.attention.interface import AttentionBackend
from core.execution.layer_times import OVERHEAD_ROWS, split_overheads
from core.execution.measure import Adapter, Products, Task
from core.execution.random_layers import LONG, SHORT, RandomLayers, choose_layer_count
from core.logs import get_logger
from core.models.architecture import Architecture
from core.placement import DeviceProfile

logger = get_logger(__name__)

ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 512)
"""Rows of the matrix products that are measured: close together where steps of decodes are, since kernels work on some
rows at a time, and the rate rises in steps."""

ROUNDS = 3
"""Every number is the median of as many, taken with all others between one and the next."""

_BANDWIDTH_SHARE, _FLOPS_SHARE, _LAYERS_SHARE = 0.1, 0.5, 0.4


_Step = tuple[int, bool]
"""Rows, and whether their sequences are long."""

KV_ROWS = 8
_STEPS: tuple[_Step, ...] = (*((rows, False) for rows in OVERHEAD_ROWS), (KV_ROWS, True))
_MOST_TOKENS = max(KV_ROWS * LONG, max(OVERHEAD_ROWS) * SHORT)


@dataclass
class _Rounds:
    """What was measured in each round, by rows or step."""

    bandwidth: list[float] = field(default_factory=list)
    flops: dict[int, list[float]] = field(default_factory=lambda: {rows: [] for rows in ROWS})
    steps_s: dict[_Step, list[float]] = field(default_factory=lambda: {step: [] for step in _STEPS})


def measure_speed(
    device: Device,
    architecture: Architecture,
    sizes: tuple[int, int],
    backend: AttentionBackend,
    adapt: Adapter,
    room_bytes: int,
    budget_s: float,
) -> DeviceProfile:
    """How fast `device` runs layers of `architecture`, in about `budget_s` seconds and in `room_bytes` of its memory.

    `sizes` are those of its gated MLPs: hidden and inner. Raises `OutOfDeviceMemoryError` without room for a product.
    """
    with torch.inference_mode():
        products = Products(device, architecture.dtype, *sizes, room_bytes // 2, adapt)
        layers = _open_layers(architecture, device, backend, adapt, room_bytes // 2)
        found = _measure_rounds(products, layers, 2 / architecture.dtype.itemsize, budget_s / ROUNDS)
        flops = tuple((rows, median(rates)) for rows, rates in found.flops.items())
        profile = DeviceProfile(device.name, median(found.bandwidth), flops)
        return profile if layers is None else _with_layers(profile, layers, found.steps_s)


def _open_layers(
    architecture: Architecture, device: Device, backend: AttentionBackend, adapt: Adapter, room_bytes: int
) -> RandomLayers | None:
    count = choose_layer_count(architecture, device, room_bytes, _MOST_TOKENS)
    if count == 0:
        logger.warning(
            "overheads are taken as 0: a layer does not fit", device=device.name, room=format_bytes(room_bytes)
        )
        return None
    return RandomLayers(architecture, device, count, backend, adapt, _MOST_TOKENS)


def _measure_rounds(products: Products, layers: RandomLayers | None, flops_per_byte: float, round_s: float) -> _Rounds:
    found, reading = _Rounds(), products.reading()
    computing: dict[int, Task] = {}
    product_s, step_s = _FLOPS_SHARE * round_s / len(ROWS), _LAYERS_SHARE * round_s / len(_STEPS)
    for _ in range(ROUNDS):
        found.bandwidth.append(reading.rate(_BANDWIDTH_SHARE * round_s))
        rate = flops_per_byte * found.bandwidth[0]
        for rows in ROWS:
            if rows not in computing:
                computing[rows] = products.computing(rows, rate, product_s)
            rate = computing[rows].rate(product_s)
            found.flops[rows].append(rate)
        if layers is not None:
            for (rows, is_long), times_s in found.steps_s.items():
                layers.set_step(rows, layers.long if is_long else layers.short)
                times_s.append(measure.time_runs(layers.step, layers.device, step_s))
    return found


def _with_layers(profile: DeviceProfile, layers: RandomLayers, steps_s: dict[_Step, list[float]]) -> DeviceProfile:
    """With the rate of attention, and what layers take beyond all that the rates account for."""
    layers.set_step(1, layers.short)
    layers.drop_layers()
    empty_s = measure.time_runs(layers.step, layers.device, 0.0)
    layer_s = {step: (median(times_s) - empty_s) / layers.count for step, times_s in steps_s.items()}
    further = KV_ROWS * (layers.long - layers.short) * layers.kv_bytes_per_token
    longer_s = layer_s[KV_ROWS, True] - layer_s[KV_ROWS, False]
    kv_rate = min(profile.bandwidth_bytes_s, further / longer_s) if further and longer_s > 0 else None
    read_s = layers.short * layers.kv_bytes_per_token / (kv_rate or profile.bandwidth_bytes_s)
    beyond_s = []
    for rows in OVERHEAD_ROWS:
        nbytes, flops = layers.work(rows)
        roofline_s = max(nbytes / profile.bandwidth_bytes_s, flops / profile.flops_at(rows))
        beyond_s.append(layer_s[rows, False] - roofline_s - rows * read_s)
    over = split_overheads(OVERHEAD_ROWS, beyond_s, empty_s)
    return replace(
        profile,
        layer_overhead_s=over.layer_s,
        row_overhead_s=over.row_s,
        step_overhead_s=over.step_s,
        kv_bandwidth_bytes_s=kv_rate,
    )
