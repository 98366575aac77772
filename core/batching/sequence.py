"""A request on its way through the engine, and the sequences it generates."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

import numpy as np
import numpy.typing as npt

from core.batching.traced import Traced
from core.defaults import DEFAULT_OWNER
from core.errors import VRAMancerError
from core.kv_cache.block_table import PrefixChain
from core.request import FinishReason, SamplingParams, TokenLogprob

_sequence_ids = count()


class SequenceStatus(enum.Enum):
    """WAITING holds no blocks (also after preemption); LOADING waits for its prefix to come up from a tier below;
    FORKING waits for its sibling's prompt; RUNNING holds blocks."""

    WAITING = "waiting"
    LOADING = "loading"
    FORKING = "forking"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """One generated continuation.

    `token_ids` is prompt plus output and only grows. `num_computed_tokens` of them have KV, `num_scheduled_tokens` have
    it or will have it once the `in_flight` steps that the sequence is part of have come back; stages know the first
    `num_told_tokens`, 0 if they do not know the sequence. `chain` keeps the hashes of its blocks. `num_failures` counts
    steps that failed with it since it last came beyond `failed_at` tokens; one that `replays` is computed again once it
    is part of no step. One that was `interrupted` ran when all KV was lost, or left behind. Set by the scheduler.
    """

    request: Request
    index: int
    seed: int
    token_ids: list[int]
    seq_id: int = field(default_factory=lambda: next(_sequence_ids))
    output_token_ids: list[int] = field(default_factory=list)
    status: SequenceStatus = SequenceStatus.WAITING
    num_computed_tokens: int = 0
    num_scheduled_tokens: int = 0
    num_told_tokens: int = 0
    chain: PrefixChain | None = None
    num_failures: int = 0
    failed_at: int = 0
    replays: bool = False
    interrupted: bool = False
    in_flight: int = 0
    last_step: int = 0
    num_preemptions: int = 0
    prefetched: bool = False
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_unscheduled(self) -> int:
        """Tokens that no step has computed or is computing. 0 while the next token is being sampled."""
        return len(self.token_ids) - self.num_scheduled_tokens

    def start_over(self) -> None:
        """It holds no blocks any more, and stages no longer know it."""
        self.rewind(0)
        self.num_told_tokens = 0
        self.prefetched = self.replays = False

    def rewind(self, num_tokens: int) -> None:
        """Only the first `num_tokens` tokens have KV from now on."""
        self.num_computed_tokens = self.num_scheduled_tokens = num_tokens

    @property
    def finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    @property
    def is_alone(self) -> bool:
        """Whether it comes into steps of its own: until one with it has succeeded after a failure, and where numbers
        are wanted instead of tokens."""
        return self.num_failures > 0 or self.request.raw is not None

    @property
    def sort_key(self) -> tuple[int, int, int]:
        """Lower is served earlier: priority, then arrival, then index."""
        return (self.request.priority, self.request.arrival, self.index)

    @property
    def queue_key(self) -> tuple[int, ...]:
        """In the queue: those that were interrupted come before others of their priority, the shortest context first.
        Their clients wait in mid-stream, and the mean of their waits is least so."""
        rank = (0, len(self.token_ids)) if self.interrupted else (1, 0)
        return (self.request.priority, *rank, self.request.arrival, self.index)

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        self.output_token_ids.append(token_id)


RawOutput = Literal["logits", "hidden_states"]
RawPositions = Literal["last", "all"]


@dataclass(eq=False, slots=True)
class RawAnswer:
    """Numbers that a request wants of its prompt in place of an answer. They come piece by piece, and once they have
    come they stay, should the prompt have to be computed again."""

    output: RawOutput
    positions: RawPositions
    _parts: list[npt.NDArray[np.float32]] = field(default_factory=list)

    def wanted(self, count: int, *, is_last: bool) -> range | None:
        """Which of the next `count` tokens' rows; None of them if the last token is not among them."""
        if self.positions == "all":
            return range(count)
        return range(count - 1, count) if is_last else None

    def add(self, start: int, rows: npt.NDArray[np.float32]) -> None:
        """What a step computed from token `start` on."""
        known = sum(map(len, self._parts)) if self.positions == "all" else start
        if len(rows) > known - start:
            self._parts.append(rows[known - start :])

    def values(self) -> npt.NDArray[np.float32]:
        """fp32 `[P, vocab]` or `[P, hidden_size]`, P being 1 or the number of tokens; once the request is done."""
        return np.concatenate(self._parts)


@dataclass(eq=False, slots=True)
class Request:
    """One prompt of `owner` with its parameters. `arrival` is a running number given by the batcher. With `raw` nothing
    is sampled. `submitted_s` is when it came, `started_s` when it was first part of a step (`time.monotonic()`).
    `traced` is there if its trace is recorded."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    priority: int = 0
    owner: str = DEFAULT_OWNER
    arrival: int = 0
    submitted_s: float = 0.0
    started_s: float | None = None
    stop_token_ids: frozenset[int] = frozenset()
    eos_token_ids: frozenset[int] = frozenset()
    sequences: list[Sequence] = field(default_factory=list)
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob | None] | None = None
    raw: RawAnswer | None = None
    traced: Traced | None = None

    @property
    def reads_prefix(self) -> bool:
        """Whether blocks of the cache will do; else every token of the prompt is computed."""
        return self.params.cache_prompt and self.params.prompt_logprobs is None and self.raw is None

    @property
    def most_tokens(self) -> int:
        """What prompt and answer may come to."""
        return len(self.prompt_token_ids) + self.max_tokens

    def fit_into(self, room: int) -> bool:
        """Before it is begun: whether so many tokens are enough. An answer of no given length takes the rest."""
        left = room - len(self.prompt_token_ids)
        if self.params.max_tokens is None and left > 0:
            self.max_tokens = min(self.max_tokens, left)
        return self.most_tokens <= room

    @property
    def finished(self) -> bool:
        return all(sequence.finished for sequence in self.sequences)

    @property
    def answering(self) -> bool:
        """Whether it has a token of its answer."""
        return any(sequence.output_token_ids for sequence in self.sequences)


@dataclass(frozen=True, slots=True)
class SequenceUpdate:
    """What a step did to one sequence: a new token, an error, or neither if that was all of a prompt whose numbers are
    wanted. The batcher turns it into output."""

    sequence: Sequence
    token_id: int | None = None
    logprob: TokenLogprob | None = None
    error: VRAMancerError | None = None


def ending_of(sequence: Sequence, max_model_len: int) -> tuple[FinishReason, int | None] | None:
    """Why the token that a sequence has just got is its last, and which stop token it is; None if it is not."""
    request, produced, token_id = sequence.request, len(sequence.output_token_ids), sequence.output_token_ids[-1]
    if produced >= request.params.min_tokens:
        if token_id in request.stop_token_ids:
            return "stop", token_id
        if token_id in request.eos_token_ids and not request.params.ignore_eos:
            return "stop", None
    if request.params.grammar is not None and token_id in request.eos_token_ids:
        return "stop", None  # whatever `min_tokens` and `ignore_eos` say: nothing else was allowed
    if produced >= request.max_tokens or len(sequence.token_ids) >= max_model_len:
        return "length", None
    return None
