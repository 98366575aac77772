"""Which layers of one stage stay in main memory and stream in. Pure.

A stage with streamed layers keeps two slots on its device, each as large as the largest of these layers. They take
turns in the slots: while one computes, the next is loaded. So streaming layers of `w` bytes each spares
`streamed * w - 2 * w` bytes, and the exact constraint of a device becomes

    ends + resident layers + 2 * slot + KV + workspace <= limit

Of the layers that may stay behind those with the fewest bytes in sum are taken, spread evenly between the resident
ones, so that there is something to compute while each of them is loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from core.costs.plan import SLOTS, LayerCosts

_EXACT_KINDS = 3


def choose_streamed(
    costs: LayerCosts, first: int, last: int, kv_tokens: int, limit_bytes: int
) -> tuple[int, ...] | None:
    """Which of layers `first .. last - 1` stream in so that the stage fits into `limit_bytes` with `kv_tokens` of KV.

    Empty where all of them fit; None where not even two slots do.
    """
    counts = _counts(costs, first, last, kv_tokens, limit_bytes)
    if counts is None:
        return None
    alike = {size: [layer for layer in range(first, last) if costs.layer_bytes[layer] == size] for size in counts}
    return tuple(sorted(layer for size, count in counts.items() for layer in spread(alike[size], count)))


def spread(layers: Sequence[int], count: int) -> list[int]:
    """`count` of the layers at even distances."""
    return [layers[(2 * turn + 1) * len(layers) // (2 * count)] for turn in range(count)]


def fewest_bytes(sizes: Mapping[int, int], excess: int) -> dict[int, int] | None:
    """How many layers of each size to stream, so that a stage needs `excess` bytes less, two slots counted.

    `sizes` is how many layers there are of each size. The fewest bytes in sum; with more than a few different sizes,
    close to that. None if there is no way.
    """
    kinds = sorted(((size, count) for size, count in sizes.items() if size > 0), reverse=True)
    best: dict[int, int] | None = None
    for index, (slot, count) in enumerate(kinds):
        rest = [(slot, count - 1), *kinds[index + 1 :]]
        covered = _cover(rest, excess + SLOTS * slot - slot)
        if covered is not None:
            chosen = {size: number + (size == slot) for (size, _), number in zip(rest, covered, strict=True)}
            if best is None or total_bytes(chosen) < total_bytes(best):
                best = chosen
    return None if best is None else {size: number for size, number in best.items() if number}


def total_bytes(counts: Mapping[int, int]) -> int:
    return sum(size * number for size, number in counts.items())


def _cover(kinds: Sequence[tuple[int, int]], target: int) -> tuple[int, ...] | None:
    """How many of each `(size, count)`, sizes descending, to reach `target` with as little in sum as possible."""
    if target <= 0:
        return (0,) * len(kinds)
    if sum(size * count for size, count in kinds) < target:
        return None
    if len(kinds) > _EXACT_KINDS:
        return _cover_roughly(kinds, target)
    (size, count), rest = kinds[0], kinds[1:]
    needed = -(-target // size)
    if not rest:
        return (needed,)
    options = ((number, _cover(rest, target - number * size)) for number in range(min(count, needed), -1, -1))
    found = [(number, *after) for number, after in options if after is not None]
    return min(found, key=lambda numbers: sum(n * s for n, (s, _) in zip(numbers, kinds, strict=True)))


def _cover_roughly(kinds: Sequence[tuple[int, int]], target: int) -> tuple[int, ...]:
    """Largest first, then without those that the others make unnecessary."""
    numbers, left = [0] * len(kinds), target
    for index, (size, count) in enumerate(kinds):
        numbers[index] = min(count, max(0, -(-left // size)))
        left -= numbers[index] * size
    for index, (size, _) in enumerate(kinds):
        spare = min(numbers[index], -left // size)
        numbers[index] -= spare
        left += spare * size
    return tuple(numbers)


def least_bytes(costs: LayerCosts, first: int, last: int, kv_tokens: int) -> int:
    """What a stage needs on its device if as much as possible streams in."""
    needed, sizes = costs.needed_bytes(first, last, kv_tokens), costs.layer_bytes[first:last]
    spared = (sum(size for size in sizes if size <= slot) - SLOTS * slot for slot in set(sizes))
    return needed - max(0, max(spared, default=0))


def streamed_bytes(
    costs: LayerCosts, first: int, last: int, kv_tokens: int, limit_bytes: int
) -> tuple[int, int] | None:
    """Bytes and number of the layers that `choose_streamed` would take; None where they do not fit."""
    counts = _counts(costs, first, last, kv_tokens, limit_bytes)
    return None if counts is None else (total_bytes(counts), sum(counts.values()))


def _counts(costs: LayerCosts, first: int, last: int, kv_tokens: int, limit_bytes: int) -> dict[int, int] | None:
    """How many layers of each size stream in; None where they do not fit."""
    excess = costs.needed_bytes(first, last, kv_tokens) - limit_bytes
    return {} if excess <= 0 else fewest_bytes(Counter(costs.layer_bytes[first:last]), excess)
