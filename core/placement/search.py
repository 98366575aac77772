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

Devices that cannot be told apart are counted, not enumerated. Where there are still too many sets, beyond about 12
devices that differ, the devices stay in the order given, and only which of them and the cuts are chosen.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.costs.cost import Batch, head_s, hop_s, layer_s
from core.costs.plan import LayerCosts, Objective, PlacementDevice
from core.costs.profile import LinkTopology
from core.devices.device import format_bytes
from core.errors import InsufficientMemoryError

_Matrix = NDArray[np.float64]
_Combine = Callable[[_Matrix, _Matrix], _Matrix]
_MOST_MOVES = 30_000
_BITS = 51
_HALVINGS = 7


class Cut(NamedTuple):
    """Layers `first .. last - 1` on the device at index `device`."""

    device: int
    first: int
    last: int


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


@dataclass(frozen=True, slots=True)
class _States:
    """The programme's states, those with fewer stages to come first.

    Attributes:
        kinds: devices that cannot be told apart, in the order given.
        left: stages to come, by state.
        moves: `(kind of the next stage, state after it)`, by state; a kind occurs once.
        starts: states in which a plan may begin.
    """

    kinds: tuple[tuple[int, ...], ...]
    left: tuple[int, ...]
    moves: tuple[tuple[tuple[int, int], ...], ...]
    starts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Times:
    """In units: `stages[kind][a, b]` of layers `a .. b - 1`, `hops[kind, kind]`. Infinite: does not fit."""

    stages: tuple[_Matrix, ...]
    hops: _Matrix
    unit_s: float

    def up_to(self, most: float) -> _Times:
        """Without stages and hops that take longer."""
        stages = tuple(np.where(stage <= most, stage, np.inf) for stage in self.stages)
        return _Times(stages, np.where(self.hops <= most, self.hops, np.inf), self.unit_s)


class PlacementSearch:
    """Finds the best plans of one model over one list of devices.

    Args:
        costs: of the model; `layer_flops` has an entry per layer.
        links: between the devices, by name.
        required: indices of devices that hold at least one layer; the others may be left out.

    Raises:
        ValueError: lengths that do not match.
    """

    def __init__(
        self, costs: LayerCosts, devices: Sequence[PlacementDevice], links: LinkTopology, required: frozenset[int]
    ) -> None:
        if not costs.num_layers == len(costs.layer_flops) == len(costs.kv_bytes_per_token):
            raise ValueError("layer_bytes, layer_flops and kv_bytes_per_token need an entry per layer")
        self._costs, self._links = costs, links
        self._profiles = [device.profile for device in devices]
        self._limits = [device.limit_bytes for device in devices]
        self._states = _make_states(self._group(required), required, costs.num_layers)

    def fits(self, kv_tokens: int) -> bool:
        """Whether any plan holds `kv_tokens` tokens. Required devices are not looked at."""
        num_layers = self._costs.num_layers
        earliest = [
            np.where(fit.any(axis=0), fit.argmax(axis=0), np.arange(num_layers + 1)).tolist()
            for fit in self._fitting(kv_tokens)
        ]
        lowest: list[int] = []
        for moves in self._states.moves:
            lowest.append(min((earliest[kind][lowest[rest]] for kind, rest in moves), default=num_layers))
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
        if objective == "latency":
            way = self._solve(times, np.add)
            value, count = self._pick(way)
            most = self._least_busy(times, way, value, count)
        else:
            most, count = self._pick(self._solve(times, np.maximum))
        return self._trace(times, most, count)

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
        way = self._solve(times, np.add)
        way_s, count = self._pick(way)
        high = self._least_busy(times, way, way_s, count)
        if way_s >= cohorts * high:
            return self._trace(times, high, count)
        low, fewest = self._pick(self._solve(times, np.maximum))
        if max(way_s, cohorts * low) * times.unit_s >= under_s:
            return None
        way_s, number = self._shortest(times, low)
        if way_s <= cohorts * low:
            return self._trace(times, low, fewest)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            middle_s, stages = self._shortest(times, middle)
            if middle_s > cohorts * middle:
                low, way_s, number = middle, middle_s, stages
            else:
                high, count = middle, stages
        return self._trace(times, low, number) if way_s <= cohorts * high else self._trace(times, high, count)

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
        for members in self._states.kinds:
            limit, fit = self._limits[members[0]], np.zeros((num_layers, num_layers + 1), bool)
            for first in range(num_layers):
                room = limit - costs.needed_bytes(first, first, 0)
                last = bisect_right(prefix, prefix[first] + room) - 1
                fit[first, first + 1 : min(last, num_layers - 1) + 1] = True
                fit[first, num_layers] = ends[first] <= limit
            tables.append(fit)
        return tables

    def _times(self, batch: Batch, kv_tokens: int, *, crowded: bool) -> _Times:
        costs, num_layers = self._costs, self._costs.num_layers
        devices = [self._profiles[members[0]] for members in self._states.kinds]
        if crowded:
            devices = [device.among(device.sharing.parts) if device.sharing else device for device in devices]
        layers = np.array([[layer_s(costs, device, layer, batch) for layer in range(num_layers)] for device in devices])
        heads = np.array([head_s(costs, device, batch) for device in devices])
        steps = np.array([device.step_overhead_s for device in devices])
        hops = np.array([[self._hop_s(src, dst, batch) for dst in self._states.kinds] for src in self._states.kinds])
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
        return _Times(tuple(stages), hops, math.ldexp(1.0, -exponent))

    def _hop_s(self, src: tuple[int, ...], dst: tuple[int, ...], batch: Batch) -> float:
        """Between devices of two kinds, or between two of a kind."""
        other = dst[0] if dst != src else src[-1]
        return hop_s(self._costs, self._links, self._profiles[src[0]].name, self._profiles[other].name, batch)

    def _tail(
        self, best: Sequence[_Matrix], hops: _Matrix, combine: _Combine, kind: int, state: int
    ) -> NDArray[np.float64]:
        """By layer: what follows a stage of `kind` that ends before that layer."""
        if self._states.left[state] == 0:
            return np.where(np.arange(self._costs.num_layers + 1) == self._costs.num_layers, 0.0, np.inf)
        tail: _Matrix = combine(best[state], hops[kind]).min(axis=1)
        return tail

    def _solve(self, times: _Times, combine: _Combine) -> list[_Matrix]:
        """By state: `[a, kind]` is the least cost of layers `a ..` when a stage of `kind` is next."""
        best: list[_Matrix] = []
        for moves in self._states.moves:
            table = np.full((self._costs.num_layers + 1, len(self._states.kinds)), np.inf)
            for kind, rest in moves:
                tail = self._tail(best, times.hops, combine, kind, rest)
                table[:-1, kind] = combine(times.stages[kind], tail).min(axis=1)
            best.append(table)
        return best

    def _shortest(self, times: _Times, most: float) -> tuple[float, int]:
        """The shortest way on which nothing takes longer than `most`, and its fewest stages."""
        return self._pick(self._solve(times.up_to(most), np.add))

    def _pick(self, best: Sequence[_Matrix]) -> tuple[float, int]:
        """The least value of a whole plan, and the fewest stages that reach it; none where no plan fits."""
        values = ((float(best[state][0].min()), self._states.left[state]) for state in self._states.starts)
        return min(((value, left) for value, left in values if math.isfinite(value)), default=(math.inf, 0))

    def _least_busy(self, times: _Times, way: Sequence[_Matrix], value: float, count: int) -> float:
        """How busy the busiest stage or link has to be in a plan of `count` stages whose way takes `value`."""
        busiest: list[_Matrix] = []
        for state, moves in enumerate(self._states.moves):
            table = np.full_like(way[state], np.inf)
            for kind, rest in moves:
                stage, hop = times.stages[kind], times.hops[kind]
                tail = self._tail(way, times.hops, np.add, kind, rest)
                after = np.zeros_like(tail)
                if self._states.left[rest]:
                    tight = way[rest] + hop == tail[:, None]
                    after = np.where(tight, np.maximum(busiest[rest], hop), np.inf).min(axis=1)
                tight = stage + tail == way[state][:-1, kind, None]
                table[:-1, kind] = np.where(tight, np.maximum(stage, after), np.inf).min(axis=1)
            busiest.append(table)
        starts = (state for state in self._states.starts if self._states.left[state] == count)
        values = (float(busiest[state][0][way[state][0] == value].min(initial=np.inf)) for state in starts)
        return min(values, default=math.inf)

    def _trace(self, times: _Times, most: float, count: int) -> tuple[Cut, ...] | None:
        """The shortest plan of `count` stages in which nothing takes longer than `most`; None if there is none.

        Of several, the one whose devices come first in the order given.
        """
        if math.isinf(most):
            return None
        states, times = self._states, times.up_to(most)
        way = self._solve(times, np.add)
        starts = [state for state in states.starts if states.left[state] == count]
        value = min(way[state][0].min() for state in starts)
        used = [0] * len(states.kinds)
        # What may come next: (kind, state, first layer), and the cuts that lead there. The devices so far are the same.
        front: dict[tuple[int, int, int], tuple[Cut, ...]] = {}
        for state in starts:
            front |= {(kind, state, 0): () for kind, _ in states.moves[state] if way[state][0, kind] == value}
        while True:
            device, kind = min((states.kinds[kind][used[kind]], kind) for kind, _, _ in front)
            used[kind] += 1
            following: dict[tuple[int, int, int], tuple[Cut, ...]] = {}
            for (next_kind, state, first), cuts in front.items():
                if next_kind != kind:
                    continue
                rest = dict(states.moves[state])[kind]
                if states.left[rest] == 0:
                    return (*cuts, Cut(device, first, self._costs.num_layers))
                totals = times.stages[kind][first][:, None] + (way[rest] + times.hops[kind])
                for last, after in np.argwhere(totals == way[state][first, kind]).tolist():
                    following.setdefault((after, rest, last), (*cuts, Cut(device, first, last)))
            front = following


def _make_states(kinds: tuple[tuple[int, ...], ...], required: frozenset[int], num_layers: int) -> _States:
    """A state is how many devices of each kind are still to come; too many of those, and the order is kept."""
    if math.prod(len(members) + 1 for members in kinds) * len(kinds) // 2 > _MOST_MOVES:
        return _ordered_states(sum(map(len, kinds)), required, num_layers)
    sets = product(*(range(len(members) + 1) for members in kinds))
    counts = sorted((count for count in sets if sum(count) <= num_layers), key=sum)
    index = {count: state for state, count in enumerate(counts)}

    def after(count: tuple[int, ...], kind: int) -> int:
        return index[tuple(number - (position == kind) for position, number in enumerate(count))]

    moves = tuple(tuple((kind, after(count, kind)) for kind, number in enumerate(count) if number) for count in counts)
    starts = tuple(
        state
        for count, state in index.items()
        if any(count)
        and all(
            number == len(members) or members[0] not in required for number, members in zip(count, kinds, strict=True)
        )
    )
    return _States(kinds, tuple(map(sum, counts)), moves, starts)


def _ordered_states(number: int, required: frozenset[int], num_layers: int) -> _States:
    """A state is the first device that may still be used, and the number of stages to come."""
    keys = [
        (first, left)
        for left in range(min(number, num_layers) + 1)
        for first in range(number + 1)
        if first + left <= number
    ]
    index = {key: state for state, key in enumerate(keys)}
    moves = []
    for first, left in keys:
        before = min((device for device in required if device >= first), default=number)
        devices = range(first, min(before, number - left) + 1) if left else ()
        after = max(required, default=-1)
        moves.append(tuple((device, index[device + 1, left - 1]) for device in devices if left > 1 or device >= after))
    starts = tuple(index[0, left] for left in range(1, min(number, num_layers) + 1))
    return _States(tuple((device,) for device in range(number)), tuple(left for _, left in keys), tuple(moves), starts)
