"""Good orders of many devices, where there are too many to try them all: a bounded local search.

In a given order, the best choice of devices and cuts is found by a programme over the devices alone::

    F[i][a] = min over b of S_i(a, b) + min(end(b), min over k > i of h_ik + F[k][b])

with S_i(a, b) what layers `a .. b - 1` take on the device in place `i`, h_ik a hop, and `end` 0 behind the last layer.
The search takes one device after another out of the order and puts it back where the whole becomes least. With prefixes
`G` (the same from the front) and suffixes `F` of the others, each place is one sum away::

    value(p) = min over a, b of  min over k < p (G[k][a] + h_kd)  +  S_d(a, b)  +  min over k >= p (h_dk + F[k][b])

Sums are of powers: with 1 they are a batch's way through all stages, with a high one they are led by the busiest stage
or link, and yet tell plans with the same busiest stage apart, which a maximum does not. Orders between the two serve
several batches in flight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

_Matrix = NDArray[np.float64]
_Order = tuple[int, ...]

POWERS = (1, 2, 4, 8, 16, 64)
MOST_DEVICES = 16
"""In an order that is searched closely; more only where memory is so short that a plan needs them."""
_MOST_SWAPPED = 10
_SWEEPS = 8
_FEW_SWEEPS = 2
_BEAM = 32
_STARTS = 4
_CLEARLY = 1 - 1e-9


def orders_that_fit(
    earliest: Sequence[Sequence[int]], limits: Sequence[int], bytes_before: Sequence[int]
) -> list[_Order]:
    """Some orders in which devices hold all layers; empty where none was found.

    `earliest[device][b]`: the first layer of the longest stage that ends before layer `b` and fits. `bytes_before[a]`:
    what the layers before `a` take. From the last stage on, those sets of devices are kept whose memory is used best.
    """
    num_layers = len(bytes_before) - 1
    kept: dict[frozenset[int], tuple[int, _Order]] = {frozenset(): (num_layers, ())}
    for _ in limits:
        following: dict[frozenset[int], tuple[int, _Order]] = {}
        fitting: list[_Order] = []
        for used, (layer, order) in kept.items():
            for device in range(len(limits)):
                if device in used:
                    continue
                reached, whole = earliest[device][layer], used | {device}
                if reached == 0:
                    fitting.append((device, *order))
                elif whole not in following or reached < following[whole][0]:
                    following[whole] = (reached, (device, *order))
        if fitting:
            return fitting[:: max(1, len(fitting) // _STARTS)][:_STARTS]
        lost = {used: sum(limits[device] for device in used) + bytes_before[following[used][0]] for used in following}
        kept = {used: following[used] for used in sorted(following, key=lost.__getitem__)[:_BEAM]}
    return []


def good_orders(
    stages: Sequence[_Matrix],
    hops: _Matrix,
    starts: Sequence[_Order],
    required: frozenset[int],
    known: Sequence[_Order] = (),
) -> list[_Order]:
    """Orders of the devices that serve one batch, or several in flight; all of the devices, or those that matter.

    `stages[device][a, b]` is what layers `a .. b - 1` take there (infinite: do not fit), `hops[i, j]` what a hop takes.
    `required` devices are in every order. The search begins with `starts`, with the devices by speed, and with a way
    along the shortest hops; or with the orders that are `known` to be good for another batch, and `starts[0]`.
    """
    stacked, hops = _scaled(stages, hops)
    landscape = _Landscape(stacked, hops, POWERS[0])
    kept = frozenset(known[0]) if known else landscape.candidates(starts[0], required)
    begins = [_only(order, kept) for order in (*known, starts[0])]
    if not known:
        begins = [_only(order, kept) for order in (*starts, *landscape.guesses())]
    found: list[_Order] = []
    for power in POWERS:
        landscape = _Landscape(stacked, hops, power)
        found.append(min(landscape.improved(start) for start in dict.fromkeys((*found, *begins)))[1])
    return list(dict.fromkeys(found))


def _only(order: _Order, devices: frozenset[int]) -> _Order:
    """The order of these devices; those that it lacks come last."""
    return (*(device for device in order if device in devices), *sorted(devices.difference(order)))


def shortest_order(stages: Sequence[_Matrix], hops: _Matrix, starts: Sequence[_Order]) -> _Order:
    """The order with the shortest way that is found from `starts`; hops may be infinite here."""
    landscape = _Landscape(*_scaled(stages, hops), 1)
    return min(landscape.improved(start) for start in starts)[1]


def _scaled(stages: Sequence[_Matrix], hops: _Matrix) -> tuple[_Matrix, _Matrix]:
    """Both as shares of the longest that is finite, so that high powers of them are."""
    stacked = np.stack(stages)
    longest = max(float(table[np.isfinite(table)].max(initial=0.0)) for table in (stacked, hops))
    return stacked / (longest or 1.0), hops / (longest or 1.0)


class _Landscape:
    """The values of orders, by sums of powers. `stages[device, a, b]` and `hops` are up to 1."""

    def __init__(self, stages: _Matrix, hops: _Matrix, power: int) -> None:
        self._stages, self._hops = stages**power, hops**power
        self._num, self._num_layers = stages.shape[:2]
        self._ends = [self._edge(layer) for layer in (0, self._num_layers)]

    def candidates(self, start: _Order, required: frozenset[int]) -> frozenset[int]:
        """All devices, or of many those of a good plan, those that are required, and the fastest of the others."""
        if self._num <= MOST_DEVICES:
            return frozenset(range(self._num))
        tried = [
            self.improved(_only(order, frozenset(range(self._num))), _FEW_SWEEPS) for order in (start, *self.guesses())
        ]
        kept = required
        for _, order in sorted(tried):  # of the best plan all devices, of others while there is room
            more = kept.union(self.used(order))
            kept = more if kept == required or len(more) <= MOST_DEVICES else kept
        others = [device for device in self.guesses()[0] if device not in kept]
        return kept.union(others[: max(0, MOST_DEVICES - len(kept))])

    def guesses(self) -> list[_Order]:
        """Orders to begin with: by what a layer takes, fastest first and last; and along the shortest hops."""
        per_layer = [float(stage.diagonal(1).min()) for stage in self._stages]
        by_speed = sorted(range(self._num), key=lambda device: per_layer[device])
        chain, left = [by_speed[0]], by_speed[1:]
        while left:
            left.sort(key=lambda device: self._hops[chain[-1], device])  # stable: the faster one of equally near ones
            chain.append(left.pop(0))
        return [tuple(by_speed), tuple(reversed(by_speed)), tuple(chain)]

    def improved(self, order: _Order, sweeps: int = _SWEEPS) -> tuple[float, _Order]:
        """The order after devices have been moved and exchanged until nothing makes it better, and its value."""
        value = float(self._suffixes(order)[:, 0].min())
        for _ in range(sweeps):
            before = value
            for device in order:
                value, order = self._moved(order, device, value)
            if not value < before * _CLEARLY and len(order) <= _MOST_SWAPPED:
                value, order = self._swapped(order, value)
            if not value < before * _CLEARLY:
                break
        return value, order

    def _swapped(self, order: _Order, value: float) -> tuple[float, _Order]:
        """The first order with two devices exchanged that is better, and its value; the same one if none is."""
        used = set(self.used(order))
        for one, two in combinations(range(len(order)), 2):
            if not used & {order[one], order[two]}:
                continue
            other = list(order)
            other[one], other[two] = other[two], other[one]
            found = float(self._suffixes(tuple(other))[:, 0].min())
            if found < value * _CLEARLY:
                return found, tuple(other)
        return value, order

    def _moved(self, order: _Order, device: int, value: float) -> tuple[float, _Order]:
        """The order with the device in its best place, and the value."""
        rest = tuple(other for other in order if other != device)
        if not rest:
            return value, order
        heads, tails = self._around(rest, device)
        sums = heads[:, : self._num_layers, None] + self._stages[device] + tails[:, None, :]
        values = sums.min(axis=(1, 2))
        place = int(values.argmin())
        if not values[place] < value * _CLEARLY:
            return value, order
        return float(values[place]), (*rest[:place], device, *rest[place:])

    def _around(self, rest: _Order, device: int) -> tuple[_Matrix, _Matrix]:
        """By place among the others: what comes before a stage of the device that begins with layer `a`, and what comes
        behind one that ends before `b`."""
        chosen, (begin, end) = list(rest), self._ends
        before = self._prefixes(rest) + self._hops[chosen, device][:, None]
        behind = self._suffixes(rest) + self._hops[device, chosen][:, None]
        heads, tails = np.vstack([begin, before]), np.vstack([behind, end])
        return np.minimum.accumulate(heads, axis=0), np.minimum.accumulate(tails[::-1], axis=0)[::-1]

    def _edge(self, layer: int) -> _Matrix:
        return np.where(np.arange(self._num_layers + 1) == layer, 0.0, np.inf)

    def _suffixes(self, order: _Order) -> _Matrix:
        """By place and layer: the least from that layer on, when the device in that place is next."""
        number = len(order)
        best = np.full((number + 1, self._num_layers + 1), np.inf)
        best[number] = self._ends[1]
        hops = np.zeros((number, number + 1, 1))  # none behind the last
        hops[:, :number, 0] = self._hops[np.ix_(order, order)]
        for place in range(number - 1, -1, -1):
            tail = (best[place + 1 :] + hops[place, place + 1 :]).min(axis=0)
            (self._stages[order[place]] + tail).min(axis=1, out=best[place, :-1])
        return best[:-1]

    def _prefixes(self, order: _Order) -> _Matrix:
        """By place and layer: the least of all layers before that one, when the device in that place was the last."""
        number = len(order)
        best = np.full((number + 1, self._num_layers + 1), np.inf)
        best[0] = self._ends[0]
        hops = np.zeros((number, number + 1, 1))
        hops[:, 1:, 0] = self._hops[np.ix_(order, order)].T
        for place, device in enumerate(order):
            head = (best[: place + 1] + hops[place, : place + 1]).min(axis=0)
            (self._stages[device] + head[:-1, None]).min(axis=0, out=best[place + 1])
        return best[1:]

    def used(self, order: _Order) -> list[int]:
        """The devices that hold layers in the best plan of this order; none where no plan fits."""
        best = self._suffixes(order)
        place, layer, devices = int(best[:, 0].argmin()), 0, list[int]()
        while layer < self._num_layers and math.isfinite(best[place, layer]):
            device, later = order[place], list(order[place + 1 :])
            devices.append(device)
            following = np.vstack(
                [best[place + 1 :] + self._hops[device, later][:, None], self._edge(self._num_layers)]
            )
            layer_after = int((self._stages[device, layer] + following.min(axis=0)).argmin())
            place, layer = place + 1 + int(following[:, layer_after].argmin()), layer_after
        return devices
