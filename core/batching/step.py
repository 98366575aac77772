"""A step while it is put together: how much it may take, what it has, and the record of it that the runner gets."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from core.batching.sequence import Sequence
from core.execution.schedule import ScheduledSequence

CONTEXT_WEIGHT = 1 / 2048
"""What a token of context adds to the weight of a sequence, beside 1 for the token it computes."""


def weight_of(sequence: Sequence) -> float:
    """What a decode of the sequence costs, beside others."""
    return 1 + CONTEXT_WEIGHT * len(sequence.token_ids)


@dataclass(slots=True)
class Step:
    """Tokens left, its share of the weight, and what it has of it."""

    budget: int
    chunk: int
    share: float = float("inf")
    weight: float = 0.0
    chosen: dict[int, tuple[Sequence, int]] = field(default_factory=dict)

    def has_room(self) -> bool:
        """Shares are rounded up to whole sequences: were they not, one that is left over would never be taken."""
        return not self.chosen or self.weight < self.share * (1 - 1e-9)

    def take(self, sequence: Sequence, num_new: int) -> None:
        """Compute the next `num_new` tokens of a sequence."""
        self.chosen[sequence.seq_id] = (sequence, num_new)
        self.budget -= num_new
        self.weight += weight_of(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Compute nothing of a sequence, whether it was taken or not."""
        chosen = self.chosen.pop(sequence.seq_id, None)
        if chosen is not None:
            self.budget += chosen[1]
            self.weight -= weight_of(sequence)

    def in_order(self) -> list[tuple[Sequence, int]]:
        """What was taken, sequences that compute a single token first."""
        return sorted(self.chosen.values(), key=lambda item: item[1] > 1)


def record_of(sequence: Sequence, num_new: int, block_table: np.ndarray) -> ScheduledSequence:
    """The next `num_new` tokens of a sequence, as the runner gets them."""
    request, start = sequence.request, sequence.num_scheduled_tokens
    reported = len(request.prompt_logprobs) if request.prompt_logprobs is not None else 0
    return ScheduledSequence(
        seq_id=sequence.seq_id,
        start=start,
        token_ids=sequence.token_ids[start : start + num_new],
        block_table=block_table,
        params=request.params,
        seed=sequence.seed,
        sample=num_new == sequence.num_unscheduled,
        prompt_token_ids=request.prompt_token_ids,
        output_token_ids=sequence.output_token_ids,
        suppress_token_ids=request.suppressed(sequence),
        prompt_logprobs=sequence.index == 0 and 0 < reported < len(request.prompt_token_ids),
    )
