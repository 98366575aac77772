"""How many steps to keep in flight, and how much of a prompt goes into one. Pure."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
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
        best = functools.partial(best_cohorts, costs, self._stages, links)
        self._best: Callable[[int, int], int] = functools.lru_cache(maxsize=4096)(best)
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
        wanted = pieces if self._while_loading else decoding + pieces
        return CohortChoice(max(cohorts, min(len(self._stages), wanted)), chunk)

    def _longest_chunk(self, takes_s: Callable[[int], float], limit_s: float) -> int:
        """Tokens, doubled while `takes_s` says that a step with them keeps to the limit."""
        chunk = MIN_CHUNK
        while chunk < self._max_chunk and takes_s(2 * chunk) <= limit_s:
            chunk *= 2
        return min(chunk, self._max_chunk)

    def _free_chunk(self) -> int:
        """Tokens that every stage computes in the time in which the slowest to load has loaded."""

        def takes_s(tokens: int) -> float:
            batch = Batch(tokens, tokens, 1)
            return max(stage_s(self._costs, each.device, each.first, each.last, batch) for each in self._stages)

        return self._longest_chunk(takes_s, self._loading_s)

    def _bounded_chunk(self, decoding: int, context: int) -> int:
        def takes_s(tokens: int) -> float:
            batch = Batch(decoding + tokens, decoding * context + tokens, decoding)
            return max(busy_s(self._costs, stage, self._links, batch) for stage in self._stages)

        return self._longest_chunk(takes_s, STALL * takes_s(0))
