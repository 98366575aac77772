"""The contract between the scheduler, which decides, and the stages, which execute. No torch here.

A step is a plain record: integers, bytes and arrays that belong to nobody else, so that it can go over a wire
(`core.execution.codec`) or wait for its turn while the scheduler goes on. What all stages have to know is in the
`StepRecord`, what one of them does to its pages in its `StagePart`. A sequence is told whole when stages first hear of
it (`NewSequence`), and by its differences from then on: tokens that were added, blocks that were. A stage keeps what it
was told until the sequence is among the `ended`; one that was ended may be told anew.

    row         0    1    2        sequences of the step, those that compute a single token first
    starts     41   17    0        tokens that have KV already
    counts      1    1    6        tokens that are computed now
    told        1    1    0        tokens that the stages have not heard of yet, in `tokens` one row after the other
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, Protocol, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from core.kv_cache.page_ops import NO_PART, StagePart
from core.request import SamplingParams, TokenLogprob

Ints: TypeAlias = npt.NDArray[np.int32]
Longs: TypeAlias = npt.NDArray[np.int64]
Flags: TypeAlias = npt.NDArray[np.uint8]

SAMPLE = 1
"""The row's last token yields the sequence's next one."""
PROMPT_LOGPROBS = 2
"""The log-probabilities of the prompt tokens that follow the row's tokens are wanted."""


def ints(values: object = ()) -> Ints:
    return np.asarray(values, dtype=np.int32)


def longs(values: object = ()) -> Longs:
    return np.asarray(values, dtype=np.int64)


class NewSequence(msgspec.Struct, frozen=True, eq=False):
    """A sequence, whole. Written by the scheduler.

    Attributes:
        token_ids: int32, prompt and what has been generated so far; `num_prompt_tokens` of them are the prompt.
        blocks: int32, its block table.
        params, seed: what its tokens are sampled by; random numbers are hashes of the seed and the token's position.
        end_token_ids: may not be sampled before `params.min_tokens` are generated.
        salt: of its prefix hashes.
    """

    seq_id: int
    token_ids: Ints
    num_prompt_tokens: int
    blocks: Ints
    params: SamplingParams
    seed: int
    end_token_ids: tuple[int, ...] = ()
    salt: bytes = b""


class RawRows(msgspec.Struct, frozen=True, eq=False):
    """Rows of the step's tokens, int32, of which logits or final hidden states are wanted as they are."""

    output: Literal["logits", "hidden_states"]
    rows: Ints


class StepRecord(msgspec.Struct, frozen=True, eq=False):
    """What every stage has to know of a step; see the module. Written by the scheduler.

    Attributes:
        seq_ids: int64 `[S]`. starts, counts, told: int32 `[S]`. flags: uint8 `[S]`, of `SAMPLE` and `PROMPT_LOGPROBS`.
        tokens: int32 `[sum(told)]`.
        blocks: int32 `[B, 3]`: (row, index in the row's block table, block) for entries that are new or changed.
        new: told before everything else. ended: int64, forgotten before that.
        raw: for a step that does not sample.
    """

    step: int
    seq_ids: Longs = msgspec.field(default_factory=longs)
    starts: Ints = msgspec.field(default_factory=ints)
    counts: Ints = msgspec.field(default_factory=ints)
    told: Ints = msgspec.field(default_factory=ints)
    flags: Flags = msgspec.field(default_factory=lambda: np.zeros(0, dtype=np.uint8))
    tokens: Ints = msgspec.field(default_factory=ints)
    blocks: Ints = msgspec.field(default_factory=lambda: np.zeros((0, 3), dtype=np.int32))
    new: tuple[NewSequence, ...] = ()
    ended: Longs = msgspec.field(default_factory=longs)
    raw: RawRows | None = None

    @property
    def num_sequences(self) -> int:
        return len(self.seq_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed."""
        return sum(self.counts.tolist())


class ScheduledSequence(NamedTuple):
    """One row of a step. Tokens `start .. end - 1` are computed."""

    seq_id: int
    start: int
    end: int


class SchedulerOutput(msgspec.Struct, frozen=True, eq=False):
    """One step as the scheduler decided it: the record, and a part for every stage (none: nobody moves a page)."""

    record: StepRecord
    parts: tuple[StagePart, ...] = ()

    @property
    def step(self) -> int:
        return self.record.step

    @property
    def num_tokens(self) -> int:
        return self.record.num_tokens

    @property
    def sequences(self) -> list[ScheduledSequence]:
        """The record's rows."""
        record = self.record
        ends = (record.starts + record.counts).tolist()
        return list(map(ScheduledSequence, record.seq_ids.tolist(), record.starts.tolist(), ends))

    def part(self, index: int) -> StagePart:
        """What stage `index` does to its pages."""
        return self.parts[index] if self.parts else NO_PART


class SampledToken(NamedTuple):
    """A chosen token; `logprob` is there if the request asked for it."""

    token_id: int
    logprob: TokenLogprob | None = None


class StepOutput(msgspec.Struct):
    """What a step produced, by sequence id. Written by the last stage.

    Attributes:
        failed: sequences whose own numbers went wrong while the rest of the step is sound, and how.
        prompt_logprobs: of the prompt tokens that follow the tokens of a row that asked for them.
        raw: fp32 `[R, vocab]` or `[R, hidden_size]`, for a step with `StepRecord.raw`.
        stage_s: seconds that each stage computed, by its name. The runner's, where somebody wants to know.
    """

    step: int
    sampled: dict[int, SampledToken] = {}
    failed: dict[int, str] = {}
    prompt_logprobs: dict[int, list[TokenLogprob]] = {}
    raw: npt.NDArray[np.float32] | None = None
    stage_s: dict[str, float] = {}


class StageReport(msgspec.Struct, frozen=True):
    """What a stage has done since it was loaded. `predicted_s` is 0 where the device's speed is not known."""

    forwards: int = 0
    busy_s: float = 0.0
    predicted_s: float = 0.0
    stream_wait_s: float = 0.0
    bytes_by_purpose: Mapping[str, int] = {}


StepDone = Callable[[SchedulerOutput, StepOutput | Exception], None]


class Runner(Protocol):
    """What the batcher needs of a model runner."""

    def execute(self, output: SchedulerOutput) -> StepOutput:
        """Run one step on every stage and sample, in the calling thread, while none is in flight.

        Raises whatever the forward pass raises.
        """

    def submit(self, output: SchedulerOutput, done: StepDone) -> None:
        """Put a step in flight; `done` is called from another thread, in the order of submission."""
