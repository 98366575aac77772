"""How many steps to keep in flight, and how much of a prompt goes into one. Pure."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from core.costs import Batch, LayerCosts, LinkTopology, StageCost
from core.costs.cost import best_cohorts, busy_s, load_s, stage_s

MIN_CHUNK = 16
STALL = 3.0
"""A step with a chunk of a prompt may take this many times as long as one without, at its slowest stage."""


@dataclass(frozen=True, slots=True)
class CohortChoice:
    """`cohorts` steps in flight, each with at most `chunk` tokens of a prompt."""

    cohorts: int
    chunk: int


class CohortPolicy(Protocol):
    """Decides before every step. `decoding` sequences of `context` tokens on average take one token each;
    `prompt_tokens` is the longest piece of prompt that waits to be computed."""

    def choose(self, decoding: int, context: int, prompt_tokens: int) -> CohortChoice: ...


class OneCohort:
    """A single stage has nothing to overlap."""

    def __init__(self, max_chunk: int) -> None:
        self._choice = CohortChoice(1, max_chunk)

    def choose(self, decoding: int, context: int, prompt_tokens: int) -> CohortChoice:
        return self._choice


class FixedCohorts:
    """As many steps as there are sequences for, up to `cohorts`; where nothing is known of the stages' speed."""

    def __init__(self, num_stages: int, cohorts: int, max_chunk: int) -> None:
        self._num_stages, self._cohorts, self._max_chunk = num_stages, cohorts, max_chunk

    def choose(self, decoding: int, context: int, prompt_tokens: int) -> CohortChoice:
        chunk = even_chunk(prompt_tokens, 2 * self._num_stages, self._max_chunk)
        pieces = -(-prompt_tokens // chunk)
        return CohortChoice(max(1, min(self._cohorts, max(decoding + bool(pieces), pieces))), chunk)


def even_chunk(prompt_tokens: int, pieces: int, most: int) -> int:
    """Tokens per chunk when a prompt is cut into `pieces`, if they are not too small to be worth a step."""
    return max(1, min(most, max(MIN_CHUNK, -(-prompt_tokens // pieces))))


class PredictedCohorts:
    """Follows the cost model: the fewest cohorts that come close to the best predicted rate, and chunks that hold up
    the other cohorts by a bounded time.

    Where layers stream in, every step loads them anew. So a step there takes as many tokens of a prompt as can be
    computed while it loads, and a prompt makes no step in flight of its own beside those that decode.
    """

    def __init__(self, costs: LayerCosts, stages: Sequence[StageCost], links: LinkTopology, *, max_chunk: int) -> None:
        self._costs, self._stages, self._links, self._max_chunk = costs, tuple(stages), links, max_chunk
        self._best = functools.lru_cache(maxsize=4096)(self._best_cohorts)
        self._bounded = functools.lru_cache(maxsize=4096)(self._bounded_chunk)
        self._loading_s = max(load_s(costs, stage, links) for stage in stages)
        self._while_loading = self._free_chunk() if self._loading_s else 0

    def choose(self, decoding: int, context: int, prompt_tokens: int) -> CohortChoice:
        bucket = 1 << max(0, context - 1).bit_length()
        cohorts = self._best(decoding, bucket) if decoding else 1
        if not prompt_tokens:
            return CohortChoice(cohorts, self._max_chunk)
        chunk = max(even_chunk(prompt_tokens, 2 * len(self._stages), self._max_chunk), self._while_loading)
        if decoding:
            chunk = min(chunk, self._bounded(-(-decoding // cohorts), bucket))
        pieces = -(-prompt_tokens // chunk)
        if self._while_loading:
            return CohortChoice(max(cohorts, min(len(self._stages), pieces)), chunk)
        return CohortChoice(max(cohorts, min(len(self._stages), decoding + pieces)), chunk)

    def _best_cohorts(self, decoding: int, context: int) -> int:
        return best_cohorts(self._costs, self._stages, self._links, decoding, context)

    def _free_chunk(self) -> int:
        """Tokens that every stage computes in the time in which the slowest to load has loaded."""
        chunk = min(MIN_CHUNK, self._max_chunk)
        while chunk < self._max_chunk:
            larger = Batch(2 * chunk, 2 * chunk, 1)
            times = (stage_s(self._costs, stage.device, stage.first, stage.last, larger) for stage in self._stages)
            if max(times) > self._loading_s:
                break
            chunk *= 2
        return min(chunk, self._max_chunk)

    def _slowest_s(self, batch: Batch) -> float:
        return max(busy_s(self._costs, stage, self._links, batch) for stage in self._stages)

    def _bounded_chunk(self, decoding: int, context: int) -> int:
        limit_s = STALL * self._slowest_s(Batch.decode(decoding, context))
        chunk = MIN_CHUNK
        while chunk < self._max_chunk:
            larger = Batch(decoding + 2 * chunk, decoding * context + 2 * chunk, decoding)
            if self._slowest_s(larger) > limit_s:
                break
            chunk *= 2
        return min(chunk, self._max_chunk)
