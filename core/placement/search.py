"""Which devices, in which order, and where to cut: an exact dynamic programme over sets of devices.

    f[S][a][j] = min over b, i of c_j(a, b) (+) t_ji (+) f[S - j][b][i]

is the least cost of layers `a ..` when the devices still to come are `S` and the next is `j`; c_j(a, b) are the seconds
of layers `a .. b - 1` on `j`, t_ji those of a hop. Devices may be left out. For "latency", (+) adds: what counts is one
batch's way through all stages and hops. For "throughput", (+) is the maximum: what counts is the busiest stage or link
for the batch of one cohort. A link counts as a resource of its own, since copies go on while the stages compute.

Of plans that are equally good, the one with the fewest stages is taken; then for "latency" the one whose busiest stage
or link is the least busy, for "throughput" the one with the shortest way; then the order in which the devices were
given.

Times are rounded to a power of two's multiple, about 2**-51 of all the time there is to spend, so that sums are exact
and equal plans compare equal. Bytes are Python's integers: no plan exceeds a limit.

Devices that cannot be told apart are counted, not enumerated. Where there are still too many sets, beyond 8 devices
that differ, `core.placement.orders` looks for good orders of them, and for each of these the programme chooses which
of them and the cuts. On random fleets that both can search, such plans come within 3 % of the best.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from core.costs.cost import Batch, head_s, hop_s, layer_s
from core.costs.plan import LayerCosts, Objective, PlacementDevice
from core.costs.profile import LinkTopology
from core.devices.device import format_bytes
from core.errors import InsufficientMemoryError
from core.placement.orders import good_orders, orders_that_fit, shortest_order
from core.placement.programme import Cut, Found, Programme, Times, counted_states, num_moves, ordered_states

EXACT_MOVES = 1_024
"""8 devices that differ, 80 layers: a third of a second for the best round."""
_BITS = 51
_CLEARLY = 0.999
_TIGHTER = (1.0, 0.96)


def lacking_memory(text: str, needs: Mapping[str, tuple[int, int]]) -> InsufficientMemoryError:
    """The error that says `text`, and what each device lacks. `needs`: the bytes that it needs, and that it may use."""
    lacking = {name: max(0, needed - limit) for name, (needed, limit) in needs.items()}
    listed = ", ".join(
        f"{name} lacks {format_bytes(lacking[name])}: it needs {format_bytes(needed)} and may use {format_bytes(limit)}"
        for name, (needed, limit) in needs.items()
        if lacking[name]
    )
    return InsufficientMemoryError(f"{text}: {listed}." if listed else f"{text}.", lacking_bytes=lacking)


def largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number up to `high` that `fits`, as all smaller ones do; at least `low`."""
    return low + bisect_left(range(low + 1, high + 1), True, key=lambda number: not fits(number))


class PlacementSearch:
    """Finds the best plans of one model over one list of devices.

    Args:
        costs: of the model; `layer_flops` has an entry per layer.
        links: between the devices, by name.
        required: indices of devices that hold at least one layer; the others may be left out.
        exact_moves: the search is exact while its programme has no more moves than these (`num_moves`).

    Raises:
        ValueError: lengths that do not match.
    """

    def __init__(
        self, costs: LayerCosts, devices: Sequence[PlacementDevice], links: LinkTopology, required: frozenset[int],
        exact_moves: int = EXACT_MOVES,
    ) -> None:  # fmt: skip
        if not costs.num_layers == len(costs.layer_flops) == len(costs.kv_bytes_per_token):
            raise ValueError("layer_bytes, layer_flops and kv_bytes_per_token need an entry per layer")
        self._costs, self._links = costs, links
        self._profiles = [device.profile for device in devices]
        self._limits = [device.limit_bytes for device in devices]
        self._required = required
        kinds = self._group(required)
        self.exact = num_moves(kinds) <= exact_moves
        self._kinds = kinds if self.exact else tuple((device,) for device in range(len(devices)))
        self._states = counted_states(kinds, required, costs.num_layers) if self.exact else None
        self._orders: list[tuple[int, ...]] = []
        self._orders_for = -1  # tokens of KV

    def fits(self, kv_tokens: int) -> bool:
        """Whether any plan holds `kv_tokens` tokens. Required devices are not looked at."""
        earliest = self._earliest(kv_tokens)
        if self._states is None:
            return bool(self._orders_that_fit(earliest, kv_tokens))
        lowest: list[int] = []
        for moves in self._states.moves:
            lowest.append(min((earliest[kind][lowest[rest]] for kind, rest in moves), default=self._costs.num_layers))
        return 0 in lowest

    def most_kv_tokens(self, least: int, most: int, block_size: int) -> int | None:
        """The most KV tokens that any plan holds, in whole blocks, up to `most`; None if `least` do not fit."""
        per_token = max(1, sum(self._costs.kv_bytes_per_token))
        low, high = -(-least // block_size), min(-(-most // block_size), sum(self._limits) // per_token // block_size)
        if not self.fits(low * block_size):
            return None
        return largest(lambda blocks: self.fits(blocks * block_size), low, high) * block_size

    def best(self, batch: Batch, kv_tokens: int, objective: Objective) -> tuple[Cut, ...] | None:
        """The best plan for `batch` that holds `kv_tokens` tokens of KV, in the order of execution; None: none fits."""
        times = self._times(batch, kv_tokens, crowded=objective == "throughput")
        found = [programme.best(objective) for programme in self._programmes(times, kv_tokens)]
        return _cuts(found)

    def best_round(
        self, batch: Batch, kv_tokens: int, cohorts: int, under_s: float = math.inf, *, crowded: bool = True
    ) -> tuple[Cut, ...] | None:
        """The plan for `cohorts` batches in flight, each like `batch`; None: none fits, or takes less than `under_s`.

        With several, all parts of a processor are taken to compute, also those that the plan leaves out; without
        `crowded`, each is taken to be the only one.

        A round, in which each is served once, takes as long as the way of one or as the busiest stage or link needs for
        all, whichever is more. Between the plan with the shortest way and the one whose busiest stage is least busy lie
        those that are longer in one and shorter in the other; the best is found to about a hundredth of that distance.
        """
        times = self._times(batch, kv_tokens, crowded=crowded and cohorts > 1)
        under = under_s / times.unit_s
        found = [programme.best_round(cohorts, under) for programme in self._programmes(times, kv_tokens)]
        if self._states is None:
            self._shorten(found, times, cohorts, under)
        return _cuts(found)

    def _shorten(self, found: list[Found | None], times: Times, cohorts: int, under: float) -> None:
        """Add better plans for a round: what is better has a shorter way, and nothing in it is so busy."""
        orders = list(self._orders)
        while (best := _least(found)) is not None:
            for share in _TIGHTER:
                order = shortest_order(*times.up_to(share * best.value / cohorts).tables, orders)
                found.append(self._in_order(order, times).best_round(cohorts, under))
                orders.insert(0, order)
            better = _least(found)
            if better is None or not better.value < best.value * _CLEARLY:
                return

    def _programmes(self, times: Times, kv_tokens: int) -> list[Programme]:
        """One over all sets and orders of devices; or one for each of some good orders."""
        if self._states is not None:
            return [Programme(self._states, times)]
        fitting = self._orders_that_fit(self._earliest(kv_tokens), kv_tokens)
        if not fitting:
            return []
        starts = [*fitting, tuple(range(len(self._profiles)))]
        if kv_tokens != self._orders_for:
            self._orders, self._orders_for = [], kv_tokens
        self._orders = good_orders(*times.tables, starts, self._required, self._orders)
        return [self._in_order(order, times) for order in self._orders]

    def _in_order(self, order: tuple[int, ...], times: Times) -> Programme:
        return Programme(ordered_states(order, self._required, self._costs.num_layers), times.of(order))

    def _earliest(self, kv_tokens: int) -> list[list[int]]:
        """By kind and layer `b`: the first layer of the longest stage that ends before `b` and fits; `b` if none."""
        every = np.arange(self._costs.num_layers + 1)
        fitting = self._fitting(kv_tokens)
        return [np.where(fit.any(axis=0), fit.argmax(axis=0), every).tolist() for fit in fitting]

    def _orders_that_fit(self, earliest: Sequence[Sequence[int]], kv_tokens: int) -> list[tuple[int, ...]]:
        costs = self._costs
        each = (w + k * kv_tokens for w, k in zip(costs.layer_bytes, costs.kv_bytes_per_token, strict=True))
        return orders_that_fit(earliest, self._limits, tuple(accumulate(each, initial=0)))

    def _group(self, required: frozenset[int]) -> tuple[tuple[int, ...], ...]:
        kinds: list[list[int]] = []
        for device in range(len(self._profiles)):
            alike = (kind for kind in kinds if (kind[0] in required) == (device in required))
            kind = next((kind for kind in alike if self._interchangeable(kind[0], device)), None)
            if kind is None:
                kind = []
                kinds.append(kind)
            kind.append(device)
        return tuple(map(tuple, kinds))

    def _interchangeable(self, one: int, two: int) -> bool:
        """Whether a plan stays as good as it is when these devices change places."""
        a, b = self._profiles[one], self._profiles[two]
        link = self._links.link
        return (
            self._limits[one] == self._limits[two]
            and replace(a, name="", source="assumed") == replace(b, name="", source="assumed")
            and link(a.name, b.name) == link(b.name, a.name)
            and all(
                link(a.name, other.name) == link(b.name, other.name)
                and link(other.name, a.name) == link(other.name, b.name)
                for index, other in enumerate(self._profiles)
                if index not in (one, two)
            )
        )

    def _fitting(self, kv_tokens: int) -> list[NDArray[np.bool_]]:
        """By kind: `[a, b]` is whether layers `a .. b - 1` fit, with their share of `kv_tokens` tokens of KV."""
        costs, num_layers = self._costs, self._costs.num_layers
        prefix = [0]
        for weights, per_token in zip(costs.layer_bytes, costs.kv_bytes_per_token, strict=True):
            prefix.append(prefix[-1] + weights + per_token * kv_tokens)
        ends = [costs.needed_bytes(first, num_layers, kv_tokens) for first in range(num_layers)]
        tables = []
        for members in self._kinds:
            limit, fit = self._limits[members[0]], np.zeros((num_layers, num_layers + 1), bool)
            for first in range(num_layers):
                room = limit - costs.needed_bytes(first, first, 0)
                last = bisect_right(prefix, prefix[first] + room) - 1
                fit[first, first + 1 : min(last, num_layers - 1) + 1] = True
                fit[first, num_layers] = ends[first] <= limit
            tables.append(fit)
        return tables

    def _times(self, batch: Batch, kv_tokens: int, *, crowded: bool) -> Times:
        costs, num_layers = self._costs, self._costs.num_layers
        devices = [self._profiles[members[0]] for members in self._kinds]
        if crowded:
            devices = [device.among(device.sharing.parts) if device.sharing else device for device in devices]
        layers = np.array([[layer_s(costs, device, layer, batch) for layer in range(num_layers)] for device in devices])
        heads = np.array([head_s(costs, device, batch) for device in devices])
        steps = np.array([device.step_overhead_s for device in devices])
        hops = np.array([[self._hop_s(src, dst, batch) for dst in self._kinds] for src in self._kinds])
        all_s = layers.max(axis=0).sum() + len(self._profiles) * (heads.max() + steps.max() + hops.max())
        if not math.isfinite(all_s):
            raise ValueError("a layer, head or hop takes forever; devices and links need speeds above 0")
        exponent = _BITS - math.frexp(all_s)[1]
        layers, heads, steps, hops = (np.rint(np.ldexp(part, exponent)) for part in (layers, heads, steps, hops))
        stages = []
        for kind, fit in enumerate(self._fitting(kv_tokens)):
            prefix = np.concatenate(([0.0], np.cumsum(layers[kind])))
            stage = prefix[None, :] - prefix[:num_layers, None] + steps[kind]
            stage[:, num_layers] += heads[kind]
            stages.append(np.where(fit, stage, np.inf))
        return Times(tuple(stages), hops, math.ldexp(1.0, -exponent))

    def _hop_s(self, src: tuple[int, ...], dst: tuple[int, ...], batch: Batch) -> float:
        """Between devices of two kinds, or between two of a kind."""
        other = dst[0] if dst != src else src[-1]
        return hop_s(self._costs, self._links, self._profiles[src[0]].name, self._profiles[other].name, batch)


def _least(found: Sequence[Found | None]) -> Found | None:
    """The best of several; of equally good ones the one with the fewest stages, then the first."""
    plans = [each for each in found if each is not None]
    return min(plans, key=lambda plan: (plan.value, len(plan.cuts)), default=None)


def _cuts(found: Sequence[Found | None]) -> tuple[Cut, ...] | None:
    best = _least(found)
    return None if best is None else best.cuts
