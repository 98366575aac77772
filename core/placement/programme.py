"""The dynamic programme of `core.placement.search` over given states and times."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.costs.plan import Objective

Matrix = NDArray[np.float64]
_Combine = Callable[[Matrix, Matrix], Matrix]
_HALVINGS = 7


class Cut(NamedTuple):
    """Layers `first .. last - 1` on the device at index `device`."""

    device: int
    first: int
    last: int


class Found(NamedTuple):
    """A plan, and what it takes by its objective, in units."""

    value: float
    cuts: tuple[Cut, ...]


@dataclass(frozen=True, slots=True)
class States:
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
class Times:
    """In units: `stages[kind][a, b]` of layers `a .. b - 1`, `hops[kind, kind]`. Infinite: does not fit."""

    stages: tuple[Matrix, ...]
    hops: Matrix
    unit_s: float

    @property
    def tables(self) -> tuple[tuple[Matrix, ...], Matrix]:
        """Stages and hops."""
        return self.stages, self.hops

    def up_to(self, most: float) -> Times:
        """Without stages and hops that take longer."""
        stages = tuple(np.where(stage <= most, stage, np.inf) for stage in self.stages)
        return Times(stages, np.where(self.hops <= most, self.hops, np.inf), self.unit_s)

    def of(self, order: Sequence[int]) -> Times:
        """Those of some kinds, in this order."""
        chosen = list(order)
        return Times(tuple(self.stages[kind] for kind in chosen), self.hops[np.ix_(chosen, chosen)], self.unit_s)


class Programme:
    """Finds the best plans among those that `states` allow, for stages and hops that take `times`."""

    def __init__(self, states: States, times: Times) -> None:
        self._states, self._times = states, times
        self._num_layers = times.stages[0].shape[0]

    def best(self, objective: Objective) -> Found | None:
        """The best plan for one batch; None: none fits."""
        times = self._times
        if objective == "latency":
            way = self._solve(times, np.add)
            value, count = self._pick(way)
            most = self._least_busy(times, way, value, count)
        else:
            value, count = self._pick(self._solve(times, np.maximum))
            most = value
        return self._found(value, most, count)

    def best_round(self, cohorts: int, under: float) -> Found | None:
        """The plan for `cohorts` batches in flight; None: none fits, or takes less than `under` units."""
        times = self._times
        way = self._solve(times, np.add)
        way_s, count = self._pick(way)
        high = self._least_busy(times, way, way_s, count)
        if way_s >= cohorts * high:
            return self._found(way_s, high, count)
        low, fewest = self._pick(self._solve(times, np.maximum))
        if max(way_s, cohorts * low) >= under:
            return None
        way_s, number = self._shortest(times, low)
        if way_s <= cohorts * low:
            return self._found(cohorts * low, low, fewest)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            middle_s, stages = self._shortest(times, middle)
            if middle_s > cohorts * middle:
                low, way_s, number = middle, middle_s, stages
            else:
                high, count = middle, stages
        if way_s <= cohorts * high:
            return self._found(way_s, low, number)
        return self._found(cohorts * high, high, count)

    def _found(self, value: float, most: float, count: int) -> Found | None:
        cuts = self._trace(self._times, most, count)
        return None if cuts is None else Found(value, cuts)

    def _tail(self, best: Sequence[Matrix], hops: Matrix, combine: _Combine, kind: int, state: int) -> Matrix:
        """By layer: what follows a stage of `kind` that ends before that layer."""
        if self._states.left[state] == 0:
            return np.where(np.arange(self._num_layers + 1) == self._num_layers, 0.0, np.inf)
        tail: Matrix = combine(best[state], hops[kind]).min(axis=1)
        return tail

    def _solve(self, times: Times, combine: _Combine) -> list[Matrix]:
        """By state: `[a, kind]` is the least cost of layers `a ..` when a stage of `kind` is next."""
        best: list[Matrix] = []
        columns: dict[tuple[int, int], Matrix] = {}  # of several states, where the order is kept
        for moves in self._states.moves:
            table = np.full((self._num_layers + 1, len(self._states.kinds)), np.inf)
            for kind, rest in moves:
                column = columns.get((kind, rest))
                if column is None:
                    tail = self._tail(best, times.hops, combine, kind, rest)
                    column = columns[kind, rest] = combine(times.stages[kind], tail).min(axis=1)
                table[:-1, kind] = column
            best.append(table)
        return best

    def _shortest(self, times: Times, most: float) -> tuple[float, int]:
        """The shortest way on which nothing takes longer than `most`, and its fewest stages."""
        return self._pick(self._solve(times.up_to(most), np.add))

    def _pick(self, best: Sequence[Matrix]) -> tuple[float, int]:
        """The least value of a whole plan, and the fewest stages that reach it; none where no plan fits."""
        values = ((float(best[state][0].min()), self._states.left[state]) for state in self._states.starts)
        return min(((value, left) for value, left in values if math.isfinite(value)), default=(math.inf, 0))

    def _least_busy(self, times: Times, way: Sequence[Matrix], value: float, count: int) -> float:
        """How busy the busiest stage or link has to be in a plan of `count` stages whose way takes `value`."""
        busiest: list[Matrix] = []
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

    def _trace(self, times: Times, most: float, count: int) -> tuple[Cut, ...] | None:
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
                    return (*cuts, Cut(device, first, self._num_layers))
                totals = times.stages[kind][first][:, None] + (way[rest] + times.hops[kind])
                for last, after in np.argwhere(totals == way[state][first, kind]).tolist():
                    following.setdefault((after, rest, last), (*cuts, Cut(device, first, last)))
            front = following


def num_moves(kinds: tuple[tuple[int, ...], ...]) -> int:
    """About how many moves the states of `counted_states` have in all: what a solution's time is proportional to."""
    return math.prod(len(members) + 1 for members in kinds) * len(kinds) // 2


def counted_states(kinds: tuple[tuple[int, ...], ...], required: frozenset[int], num_layers: int) -> States:
    """All sets and orders. A state is how many devices of each kind are still to come."""
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
    return States(kinds, tuple(map(sum, counts)), moves, starts)


def ordered_states(order: Sequence[int], required: frozenset[int], num_layers: int) -> States:
    """All sets in one order of the devices. A state is the first device that may still be used, by its place in the
    order, and the number of stages to come."""
    number, needed = len(order), [place for place, device in enumerate(order) if device in required]
    keys = [
        (first, left)
        for left in range(min(number, num_layers) + 1)
        for first in range(number + 1)
        if first + left <= number
    ]
    index = {key: state for state, key in enumerate(keys)}
    moves = []
    for first, left in keys:
        before = min((place for place in needed if place >= first), default=number)
        places = range(first, min(before, number - left) + 1) if left else ()
        after = max(needed, default=-1)
        moves.append(tuple((place, index[place + 1, left - 1]) for place in places if left > 1 or place >= after))
    starts = tuple(index[0, left] for left in range(1, min(number, num_layers) + 1))
    return States(tuple((device,) for device in order), tuple(left for _, left in keys), tuple(moves), starts)
