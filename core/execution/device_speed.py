"""A device's profile from short real runs, repeated in rounds: what disturbs one second does not decide a number."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from statistics import median

import torch

from core.devices import Device, format_bytes
from core.execution import measure
from core.execution.attention.interface import AttentionBackend
from core.execution.layer_times import OVERHEAD_ROWS, Overheads, split_overheads
from core.execution.measure import Adapter, Products, Task
from core.execution.random_layers import RandomLayers, choose_layer_count
from core.logs import get_logger
from core.models.architecture import Architecture
from core.models.stage_model import measure_bytes
from core.placement import DeviceProfile

logger = get_logger(__name__)

ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 512)
"""Rows of the matrix products that are measured: close together where steps of decodes are, since kernels work on some
rows at a time, and the rate rises in steps."""

ROUNDS = 3
"""Every number is the median of as many, taken with all others between one and the next."""

_BANDWIDTH_SHARE, _FLOPS_SHARE, _LAYERS_SHARE = 0.1, 0.5, 0.4


@dataclass
class _Rounds:
    """What was measured in each round, by rows."""

    bandwidth: list[float] = field(default_factory=list)
    flops: dict[int, list[float]] = field(default_factory=lambda: {rows: [] for rows in ROWS})
    steps_s: dict[int, list[float]] = field(default_factory=lambda: {rows: [] for rows in OVERHEAD_ROWS})


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
        if layers is None:
            return profile
        over = _overheads(profile, layers, found.steps_s)
    return replace(profile, layer_overhead_s=over.layer_s, row_overhead_s=over.row_s, step_overhead_s=over.step_s)


def _open_layers(
    architecture: Architecture, device: Device, backend: AttentionBackend, adapt: Adapter, room_bytes: int
) -> RandomLayers | None:
    layer_bytes = max(measure_bytes(architecture).layers)
    count = choose_layer_count(architecture, layer_bytes, device, room_bytes)
    if count == 0:
        logger.warning(
            "overheads are taken as 0: a layer does not fit",
            device=device.name, layer=format_bytes(layer_bytes), room=format_bytes(room_bytes),
        )  # fmt: skip
        return None
    return RandomLayers(architecture, device, count, backend, adapt, max(OVERHEAD_ROWS))


def _measure_rounds(products: Products, layers: RandomLayers | None, flops_per_byte: float, round_s: float) -> _Rounds:
    found, reading = _Rounds(), products.reading()
    computing: dict[int, Task] = {}
    product_s, step_s = _FLOPS_SHARE * round_s / len(ROWS), _LAYERS_SHARE * round_s / len(OVERHEAD_ROWS)
    for _ in range(ROUNDS):
        found.bandwidth.append(reading.rate(_BANDWIDTH_SHARE * round_s))
        rate = flops_per_byte * found.bandwidth[0]
        for rows in ROWS:
            if rows not in computing:
                computing[rows] = products.computing(rows, rate, product_s)
            rate = computing[rows].rate(product_s)
            found.flops[rows].append(rate)
        if layers is not None:
            for rows, times_s in found.steps_s.items():
                layers.set_rows(rows)
                times_s.append(measure.time_runs(layers.step, layers.device, step_s))
    return found


def _overheads(profile: DeviceProfile, layers: RandomLayers, steps_s: dict[int, list[float]]) -> Overheads:
    """What the layers' steps took beyond what reading and computing at the profile's speed account for."""
    layers.set_rows(1)
    layers.drop_layers()
    empty_s = measure.time_runs(layers.step, layers.device, 0.0)
    beyond_s: list[float] = []
    for rows, times_s in steps_s.items():
        nbytes, flops = layers.work(rows)
        roofline_s = max(nbytes / profile.bandwidth_bytes_s, flops / profile.flops_at(rows))
        beyond_s.append((median(times_s) - empty_s) / layers.count - roofline_s)
    return split_overheads(OVERHEAD_ROWS, beyond_s, empty_s)
