"""A device's profile from short real runs, repeated in rounds: what disturbs one second does not decide a number."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import Any

import torch

from core.costs import DeviceProfile
from core.devices import Device, format_bytes
from core.execution.attention.interface import AttentionBackend
from core.logs import get_logger
from core.models.architecture import Architecture
from core.profiling import measure
from core.profiling.layer_times import OVERHEAD_ROWS, split_overheads
from core.profiling.measure import Adapter, Products, Rate
from core.profiling.random_layers import KV_ROWS, SHORT, RandomLayers, choose_layer_count, layer_room, many_tokens

logger = get_logger(__name__)

ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 512)
"""Rows of the matrix products that are measured: close together where steps of decodes are, since kernels work on some
rows at a time, and the rate rises in steps."""

ROUNDS = 3
"""Every number is the median of as many, taken with all others between one and the next."""

_LEAST_TOKENS = max(OVERHEAD_ROWS) * SHORT
"""Of KV, without which layers cannot be measured."""

_BANDWIDTH_SHARE, _FLOPS_SHARE, _LAYERS_SHARE = 0.1, 0.5, 0.4

_CLEARLY = 0.05
"""Long contexts have to take a layer so much longer before a rate is read off them."""

_EMPTY, _LONG = 0, -1
_STEPS = (*OVERHEAD_ROWS, _LONG, _EMPTY)
"""Steps of so many rows, of a few with long contexts, and one that passes the layers by."""


_Rounds = dict[int, list[float]]
"""What was measured in each round, by rows or step."""


def layer_shape(architecture: Architecture) -> dict[str, Any]:
    """What a middle layer's speed depends on, beside its dtype; with experts, `intermediate` is one expert's."""
    config = architecture.config.get_text_config()
    names = ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner")
    sizes = [getattr(config, name, None) for name in names]
    kv = architecture.kv_shapes[architecture.num_layers // 2]
    return {
        "model_type": architecture.model_type,
        "hidden": architecture.hidden_size,
        "intermediate": next((int(size) for size in sizes if size), 4 * architecture.hidden_size),
        "heads": architecture.num_heads,
        "kv_heads": kv.num_kv_heads,
        "key_dim": kv.key_dim,
        "value_dim": kv.value_dim,
        **({"quantization": architecture.quantization.key} if architecture.quantization is not None else {}),
    }


def measure_speed(
    device: Device,
    architecture: Architecture,
    backend: AttentionBackend,
    adapt: Adapter,
    room_bytes: int,
    budget_s: float,
) -> DeviceProfile:
    """How fast `device` runs layers of `architecture`, in about `budget_s` seconds and in `room_bytes` of its memory.

    Raises `OutOfDeviceMemoryError` without room for a product.
    """
    with torch.inference_mode():
        # Both are there at the same time. Products may be narrow; a layer has to be whole.
        beside = max(room_bytes // 8, room_bytes - layer_room(architecture, _LEAST_TOKENS))
        inner, room = layer_shape(architecture)["intermediate"], min(room_bytes // 2, beside)
        products = Products(device, architecture.dtype, architecture.hidden_size, inner, room, adapt)
        layers = _open_layers(architecture, device, backend, adapt, room_bytes - products.nbytes)
        flops_per_byte = 2 / architecture.dtype.itemsize
        bandwidth, flops, steps_s = _measure_rounds(products, layers, flops_per_byte, budget_s / ROUNDS)
        rates = tuple((rows, median(found)) for rows, found in flops.items())
        profile = DeviceProfile(device.name, median(bandwidth), rates)
        return profile if layers is None else _with_layers(profile, layers, steps_s)


def _open_layers(
    architecture: Architecture, device: Device, backend: AttentionBackend, adapt: Adapter, room_bytes: int
) -> RandomLayers | None:
    for tokens in (many_tokens(architecture), _LEAST_TOKENS):
        count = choose_layer_count(architecture, device, room_bytes, tokens)
        if count:
            return RandomLayers(architecture, device, count, backend, adapt, tokens)
    logger.warning("overheads are taken as 0: a layer does not fit", device=device.name, room=format_bytes(room_bytes))
    return None


def _measure_rounds(
    products: Products, layers: RandomLayers | None, flops_per_byte: float, round_s: float
) -> tuple[list[float], _Rounds, _Rounds]:
    """Bytes per second in each round, operations per second by rows, and seconds by step."""
    reading, computing = products.reading(), dict[int, Rate]()
    bandwidth, flops, steps_s = list[float](), _Rounds(), _Rounds()
    product_s, step_s = _FLOPS_SHARE * round_s / len(ROWS), _LAYERS_SHARE * round_s / len(_STEPS)
    for _ in range(ROUNDS):
        bandwidth.append(reading(_BANDWIDTH_SHARE * round_s))
        rate = flops_per_byte * bandwidth[0]
        for rows in ROWS:
            if rows not in computing:
                computing[rows] = products.computing(rows, rate, product_s)
            rate = computing[rows](product_s)
            flops.setdefault(rows, []).append(rate)
        if layers is None:
            continue
        for step in _STEPS:
            layers.pass_by(step == _EMPTY)
            layers.set_step(*((KV_ROWS, layers.long) if step == _LONG else (max(1, step), layers.short)))
            steps_s.setdefault(step, []).append(measure.time_runs(layers.step, layers.device, step_s))
    return bandwidth, flops, steps_s


def _with_layers(profile: DeviceProfile, layers: RandomLayers, steps_s: _Rounds) -> DeviceProfile:
    """With the rate of attention, and what layers take beyond all that the rates account for."""
    kv_rate = _kv_rate(layers, steps_s, profile.bandwidth_bytes_s)
    read_s = layers.kv_bytes(layers.short) / (kv_rate or profile.bandwidth_bytes_s)
    beyond_s = []
    for rows in OVERHEAD_ROWS:
        nbytes, flops = layers.work(rows)
        roofline_s = max(nbytes / profile.bandwidth_bytes_s, flops / profile.flops_at(rows))
        beyond_s.append(_longer_s(steps_s, rows, _EMPTY) / layers.count - roofline_s - rows * read_s)
    layer_s, row_s = split_overheads(OVERHEAD_ROWS, beyond_s)
    return replace(
        profile,
        layer_overhead_s=layer_s,
        row_overhead_s=row_s,
        step_overhead_s=median(steps_s[_EMPTY]),
        kv_bandwidth_bytes_s=kv_rate,
    )


def _kv_rate(layers: RandomLayers, steps_s: _Rounds, bandwidth_bytes_s: float) -> float | None:
    """None: KV took so little time that nothing can be said, and as fast as weights is likely."""
    further = layers.count * KV_ROWS * (layers.kv_bytes(layers.long) - layers.kv_bytes(layers.short))
    longer_s = _longer_s(steps_s, _LONG, KV_ROWS)
    if further <= 0 or longer_s < _CLEARLY * median(steps_s[KV_ROWS]):
        return None
    return min(bandwidth_bytes_s, further / longer_s)


def _longer_s(steps_s: _Rounds, step: int, other: int) -> float:
    """How much longer one kind of step takes than another: the median of what it was in each round."""
    return median(a - b for a, b in zip(steps_s[step], steps_s[other], strict=True))
