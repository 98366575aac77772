"""The search of `core.placement.search` over stages whose layers may stream in: they fit where two slots do, and take
as long as computing or loading, whichever is more."""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray

from core.costs import SLOTS, PlacementProblem
from core.costs.cost import Batch
from core.costs.profile import LinkProfile
from core.devices.device import host_of
from core.placement.programme import Cut, Times
from core.placement.search import PlacementSearch
from core.placement.streamed_layers import streamed_bytes

_EXACT = 2.0**50


class StreamingSearch(PlacementSearch):
    """Everything but what fits and how long it takes is as in `PlacementSearch`."""

    def __init__(self, request: PlacementProblem, required: frozenset[int]) -> None:
        self._loads = functools.lru_cache(maxsize=None)(functools.partial(streamed_bytes, request.costs))
        self._request = request
        super().__init__(request.costs, request.devices, request.links, required)

    def _interchangeable(self, one: int, two: int) -> bool:
        return (
            super()._interchangeable(one, two)
            and self._from_host(one) == self._from_host(two)
            and self._may_stream(one) == self._may_stream(two)
        )

    def _from_host(self, device: int) -> LinkProfile:
        name = self._profiles[device].name
        return self._links.link(host_of(name), name)

    def _may_stream(self, device: int) -> bool:
        return self._request.host_room(self._profiles[device].name) > 0

    def _fitting(self, kv_tokens: int) -> list[NDArray[np.bool_]]:
        """By kind: `[a, b]` is whether layers `a .. b - 1` fit, if as many as need be stream in where they can."""
        costs, num_layers = self._costs, self._costs.num_layers
        first, last = np.meshgrid(np.arange(num_layers), np.arange(num_layers + 1), indexing="ij")
        per_layer = [w + k * kv_tokens for w, k in zip(costs.layer_bytes, costs.kv_bytes_per_token, strict=True)]
        inner = _sums(per_layer)[last] - _sums(per_layer)[first]
        ends = np.zeros_like(inner)
        for a in range(num_layers):
            ends[a] = costs.needed_bytes(a, a, 0)
            ends[a, num_layers] = costs.needed_bytes(a, num_layers, 0) - sum(costs.layer_bytes[a:])
        spared = np.zeros_like(inner)
        for slot in set(costs.layer_bytes):
            sums = _sums([size if size <= slot else 0 for size in costs.layer_bytes])
            spared = np.maximum(spared, sums[last] - sums[first] - SLOTS * slot)
        needed = inner + ends - spared
        firsts = [members[0] for members in self._kinds]
        return [
            (last > first) & (needed + (0 if self._may_stream(device) else spared) <= self._limits[device])
            for device in firsts
        ]

    def _times(self, batch: Batch, kv_tokens: int, *, crowded: bool) -> Times:
        times = super()._times(batch, kv_tokens, crowded=crowded)
        loads = [
            self._load_units(members[0], kv_tokens, stage, times.unit_s)
            for members, stage in zip(self._kinds, times.stages, strict=True)
        ]
        # Sums have to stay exact: coarser units, where loading takes much longer than computing.
        longest = max(float(load.max()) for load in loads) * len(self._profiles)
        shift = max(0, math.frexp(longest / _EXACT)[1])
        stages = tuple(
            np.rint(np.ldexp(np.maximum(stage, load), -shift)) for stage, load in zip(times.stages, loads, strict=True)
        )
        return Times(stages, np.rint(np.ldexp(times.hops, -shift)), math.ldexp(times.unit_s, shift))

    def _load_units(
        self, device: int, kv_tokens: int, stage: NDArray[np.float64], unit_s: float
    ) -> NDArray[np.float64]:
        """By first and last layer: how long what streams in takes; 0 where the stage does not fit anyway."""
        link, limit, loads = self._from_host(device), self._limits[device], np.zeros_like(stage)
        for first, last in np.argwhere(np.isfinite(stage)).tolist():
            nbytes, count = self._loads(first, last, kv_tokens, limit) or (0, 0)
            loads[first, last] = (count * link.latency_s + nbytes / link.bandwidth_bytes_s) / unit_s
        return loads


def _sums(values: list[int]) -> NDArray[np.int64]:
    return np.concatenate(([0], np.cumsum(np.array(values, np.int64))))


def streaming_cuts(request: PlacementProblem, search: StreamingSearch, kv_tokens: int) -> list[tuple[Cut, ...]]:
    """What the programme finds best for all streams in one batch, and for numbers of cohorts that may serve well."""
    streams, context = request.streams, request.context
    if request.objective == "latency":
        found = [search.best(Batch.decode(streams, context), kv_tokens, "latency")]
    else:
        counts = sorted({min(count, streams) for count in (1, 2, len(request.devices), 2 * len(request.devices))})
        found = [search.best_round(Batch.decode(-(-streams // n), context), kv_tokens, n) for n in counts]
    return list(dict.fromkeys(cuts for cuts in found if cuts is not None))
