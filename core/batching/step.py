"""A step while it is put together: how much it may take, what it has, and the record of it that the runner gets."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from core.batching.sequence import Sequence
from core.execution.records import (
    PROMPT_LOGPROBS,
    SAMPLE,
    Ints,
    NewSequence,
    RawRows,
    SchedulerOutput,
    StepRecord,
    ints,
    longs,
)
from core.kv_cache.block_table import RopeBorder
from core.kv_cache.manager import KVCacheManager

CONTEXT_WEIGHT = 1 / 2048
"""What a token of context adds to the weight of a sequence, beside 1 for the token it computes."""


def weight_of(sequence: Sequence) -> float:
    """What a decode of the sequence costs, beside others."""
    return 1 + CONTEXT_WEIGHT * len(sequence.token_ids)


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Sizes of a step, in sequences and tokens. `max_model_len` caps prompt plus output; beyond `rope` keys differ."""

    max_batch_size: int
    max_num_batched_tokens: int
    prefill_chunk_size: int
    max_model_len: int
    rope: RopeBorder | None = None


@dataclass(slots=True)
class StepDraft:
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


def record_of(number: int, chosen: list[tuple[Sequence, int]], ended: list[int], kv: KVCacheManager) -> StepRecord:
    """The record of step `number`, in which each sequence computes its next tokens, and `ended` ones are forgotten.
    What stages are told by it counts as told.
    """
    new: list[NewSequence] = []
    told: list[list[int]] = []
    blocks: list[tuple[int, int, int]] = []
    for row, (sequence, _) in enumerate(chosen):
        table = kv.table(sequence.seq_id)
        if not sequence.num_told_tokens:
            new.append(_whole(sequence, table.tell_all()))
            told.append([])
        else:
            told.append(sequence.token_ids[sequence.num_told_tokens :])
            blocks.extend((row, index, block) for index, block in table.tell_changes())
        sequence.num_told_tokens = len(sequence.token_ids)
    return StepRecord(
        step=number,
        seq_ids=longs([sequence.seq_id for sequence, _ in chosen]),
        starts=ints([sequence.num_scheduled_tokens for sequence, _ in chosen]),
        counts=ints([num_new for _, num_new in chosen]),
        told=ints([len(tokens) for tokens in told]),
        flags=np.array([_flags(sequence, num_new) for sequence, num_new in chosen], dtype=np.uint8),
        tokens=ints([token for tokens in told for token in tokens]),
        blocks=ints(blocks).reshape(-1, 3),
        new=tuple(new),
        ended=longs(ended),
        raw=_raw_rows(chosen),
    )


def _raw_rows(chosen: list[tuple[Sequence, int]]) -> RawRows | None:
    """What a sequence that is alone in its step wants of it as it is."""
    if len(chosen) != 1 or (raw := chosen[0][0].request.raw) is None:
        return None
    sequence, num_new = chosen[0]
    rows = raw.wanted(num_new, is_last=num_new == sequence.num_unscheduled)
    return RawRows(raw.output, ints(rows)) if rows is not None else None


def _whole(sequence: Sequence, blocks: Ints) -> NewSequence:
    """Everything that stages have to know of a sequence."""
    request = sequence.request
    return NewSequence(
        seq_id=sequence.seq_id,
        token_ids=ints(sequence.token_ids),
        num_prompt_tokens=sequence.num_prompt_tokens,
        blocks=blocks,
        params=request.params,
        seed=sequence.seed,
        end_token_ids=tuple(sorted(request.stop_token_ids | request.eos_token_ids)),
    )


def _flags(sequence: Sequence, num_new: int) -> int:
    request = sequence.request
    flags = SAMPLE if num_new == sequence.num_unscheduled and request.raw is None else 0
    if sequence.index == 0 and request.prompt_logprobs is not None:
        flags |= PROMPT_LOGPROBS if 0 < len(request.prompt_logprobs) < len(request.prompt_token_ids) else 0
    return flags


MEASURED_TOKENS = 16
"""A step with as many tokens says what a token of a prompt costs."""


class PrefillMeter:
    """Steps end in the order in which they begin. What a step waited for those in flight before it is not its time, and
    what it took to move pages besides counts as little as possible."""

    def __init__(self) -> None:
        self.token_s: float | None = None
        self._began_s: dict[int, float] = {}
        self._ended_s = 0.0

    def begun(self, step: int) -> None:
        self._began_s[step] = time.perf_counter()

    def failed(self, step: int) -> None:
        """A step that failed says nothing."""
        self._began_s.pop(step, None)
        self._ended_s = time.perf_counter()

    def ended(self, output: SchedulerOutput) -> float | None:
        """Seconds per token of a prompt, with this step; None until one has been measured."""
        now_s, before_s = time.perf_counter(), self._ended_s
        self._ended_s = now_s
        began_s = self._began_s.pop(output.step, None)
        if began_s is None or output.num_tokens < MEASURED_TOKENS:
            return self.token_s
        token_s, old_s = (now_s - max(began_s, before_s)) / output.num_tokens, self.token_s
        if old_s is not None and any(part.ops for part in output.parts):
            token_s = min(token_s, old_s)
        self.token_s = token_s if old_s is None else old_s + 0.3 * (token_s - old_s)
        return self.token_s


def relaxed(cap: int, limits: SchedulerLimits) -> int | None:
    """A step has succeeded: the next ones may be a little larger, up to what the limits allow."""
    cap += max(1, cap // 16)
    return cap if cap < limits.max_num_batched_tokens else None
