"""The whole contract between the scheduler, which decides, and the runner, which executes. No torch here.

A `SchedulerOutput` is self-contained: block tables are snapshots, so several outputs may be in flight while the
scheduler goes on. Token lists are the sequences' own and only ever grow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from core.errors import VRAMancerError
from core.kv_cache.page_ops import NOTHING, StageStep
from core.request import SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """One sequence's share of a step. Written by the scheduler, read by the runner.

    Tokens `start .. start + len(token_ids) - 1` are computed; their K and V go to the pages of `block_table`. With
    `sample`, the last of them yields the sequence's next token. `prompt_logprobs` asks for the log-probabilities of
    the prompt tokens that follow the computed positions.
    """

    seq_id: int
    start: int
    token_ids: Sequence[int]
    block_table: np.ndarray
    params: SamplingParams
    seed: int
    sample: bool
    prompt_token_ids: Sequence[int] = ()
    output_token_ids: Sequence[int] = ()
    suppress_token_ids: tuple[int, ...] = ()
    prompt_logprobs: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def end(self) -> int:
        """Tokens of the sequence that have KV after this step."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step. Sequences that compute a single token come first. `stages` holds what each stage does to its pages
    before it computes anything, and where they are then; empty: nothing, and where the block ids say.
    `ended_seq_ids` are sequences whose state the runner may drop.
    """

    step: int
    sequences: tuple[ScheduledSequence, ...]
    stages: tuple[StageStep, ...] = ()
    ended_seq_ids: tuple[int, ...] = ()

    def stage(self, index: int) -> StageStep:
        """The part of stage `index`."""
        return self.stages[index] if self.stages else NOTHING

    @property
    def num_tokens(self) -> int:
        return sum(len(item.token_ids) for item in self.sequences)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A chosen token; `logprob` is there if the request asked for it."""

    token_id: int
    logprob: TokenLogprob | None = None


@dataclass(slots=True)
class StepOutput:
    """What a step produced, by sequence id. Written by the runner. `failed` holds sequences whose own numbers went
    wrong while the rest of the step is sound.
    """

    step: int
    sampled: dict[int, SampledToken] = field(default_factory=dict)
    failed: dict[int, VRAMancerError] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)


StepDone = Callable[[SchedulerOutput, StepOutput | Exception], None]


class Runner(Protocol):
    """What the batcher needs of a model runner."""

    def execute(self, output: SchedulerOutput) -> StepOutput:
        """Run one step on every stage and sample, in the calling thread, while none is in flight.

        Raises whatever the forward pass raises.
        """
        ...

    def submit(self, output: SchedulerOutput, done: StepDone) -> None:
        """Put a step in flight; `done` is called from another thread, in the order of submission."""
        ...
