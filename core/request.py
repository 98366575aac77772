"""What a client asks (`SamplingParams`) and what it gets back (`RequestOutput`), shared by every layer.

Only plain values live here: no tensors, no locks, so that every package may import it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from core.errors import InvalidRequestError

FinishReason = Literal["stop", "length", "abort", "error"]
Phase = Literal["prefill", "decode"]

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS = 1024
MAX_SEED = 2**63 - 1
MAX_GRAMMAR_BYTES = 128 * 1024
"""Stages are told a sequence's parameters whole, and many sequences in one message."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when a sequence ends. Names follow OpenAI's and, beyond it, vLLM's API.

    `top_k` 0 and `top_p` 1 and `min_p` 0 mean off; `top_p` 0 leaves the likeliest token alone, `temperature` 0 is
    greedy. `max_tokens` None runs to the end of the context. `logprobs` is the number of alternatives reported beside
    the sampled token (0: the token alone). `kept_special_tokens` are part of the text where others are skipped.
    `grammar`, of `core.grammars`, is what the answer keeps to; an answer that is complete by it ends. Without
    `cache_prompt` every token of the prompt is computed, whatever the prefix cache has.
    """

    n: int = 1
    best_of: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    kept_special_tokens: tuple[int, ...] = ()
    detokenize: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: str | None = None
    cache_prompt: bool = True

    @property
    def num_sequences(self) -> int:
        """Sequences that are generated for one prompt (`best_of` of which the best `n` are returned)."""
        return self.best_of if self.best_of is not None else self.n

    @property
    def penalized(self) -> bool:
        """Whether tokens that have occurred are less, or more, likely."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def validate(self, vocab_size: int, names: Mapping[str, str] | None = None) -> None:
        """Raise `InvalidRequestError` naming the first parameter that is out of range. The one place that says what is.

        `names` gives what the client calls a parameter where that is not its name here.
        """
        called = names or {}
        for name, low, high in _INTEGER_RANGES:
            _check_number(called.get(name, name), getattr(self, name), low, high, integer=True)
        for name, lowest, highest in _FLOAT_RANGES:
            _check_number(called.get(name, name), getattr(self, name), lowest, highest, integer=False)
        if self.repetition_penalty <= 0:
            raise InvalidRequestError("repetition_penalty must be above 0.", param="repetition_penalty")
        if self.best_of is not None and self.best_of < self.n:
            raise InvalidRequestError(f"best_of ({self.best_of}) must be at least n ({self.n}).", param="best_of")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens}).", param="min_tokens"
            )
        if self.grammar is not None and len(self.grammar.encode()) > MAX_GRAMMAR_BYTES:
            raise InvalidRequestError(f"A grammar has at most {MAX_GRAMMAR_BYTES} bytes.", param="grammar")
        self._validate_stops(vocab_size)
        self._validate_logit_bias(vocab_size)

    def _validate_stops(self, vocab_size: int) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError(f"stop takes at most {MAX_STOP_STRINGS} strings.", param="stop")
        if any(not text or len(text) > MAX_STOP_LENGTH for text in self.stop):
            raise InvalidRequestError(
                f"each stop string must have between 1 and {MAX_STOP_LENGTH} characters.", param="stop"
            )
        if self.stop and not self.detokenize:
            raise InvalidRequestError("stop strings need detokenize to be true.", param="stop")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequestError(f"stop_token_ids takes at most {MAX_STOP_TOKEN_IDS} ids.", param="stop_token_ids")
        if any(not 0 <= token < vocab_size for token in self.stop_token_ids):
            raise InvalidRequestError(
                f"stop_token_ids must lie between 0 and {vocab_size - 1}.", param="stop_token_ids"
            )

    def _validate_logit_bias(self, vocab_size: int) -> None:
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequestError(f"logit_bias takes at most {MAX_LOGIT_BIAS} tokens.", param="logit_bias")
        for token, bias in self.logit_bias.items():
            if not 0 <= token < vocab_size:
                raise InvalidRequestError(
                    f"logit_bias names token {token}; ids lie between 0 and {vocab_size - 1}.", param="logit_bias"
                )
            if not -100 <= bias <= 100:
                raise InvalidRequestError("logit_bias values must lie between -100 and 100.", param="logit_bias")


_INTEGER_RANGES: tuple[tuple[str, int, int], ...] = (
    ("n", 1, MAX_N),
    ("best_of", 1, MAX_N),
    ("max_tokens", 1, 2**31 - 1),
    ("min_tokens", 0, 2**31 - 1),
    ("top_k", 0, 2**31 - 1),
    ("seed", -MAX_SEED - 1, MAX_SEED),
    ("logprobs", 0, MAX_LOGPROBS),
    ("prompt_logprobs", 0, MAX_LOGPROBS),
)
_FLOAT_RANGES: tuple[tuple[str, float, float], ...] = (
    ("temperature", 0.0, 2.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
    ("repetition_penalty", 0.0, 10.0),
)

_SHOWN_BELOW = 10**18  # JSON's integers may have thousands of digits


def _check_number(name: str, value: float | None, low: float, high: float, *, integer: bool) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)):
        kind = "an integer" if integer else "a number"
        raise InvalidRequestError(f"{name} must be {kind}.", param=name)
    if not low <= value <= high:  # nor is NaN
        got = f", got {value}" if abs(value) < _SHOWN_BELOW else ""
        raise InvalidRequestError(f"{name} must lie between {low} and {high}{got}.", param=name)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token under the raw model distribution, with the `top` alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceDelta:
    """What one sequence gained since the previous output. Written by the batcher."""

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One message from the engine to a request's handle.

    `prompt_logprobs` comes once, with the first output; its first entry is None (nothing precedes it).
    `num_cached_tokens` counts prompt tokens whose KV was found in the prefix cache.
    """

    request_id: str
    deltas: tuple[SequenceDelta, ...]
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finished: bool = False


@dataclass(slots=True)
class Completion:
    """One finished sequence."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def cumulative_logprob(self) -> float:
        return sum(item.logprob for item in self.logprobs)


@dataclass(slots=True)
class GenerationResult:
    """A whole request, gathered: the best `n` completions, in order of index."""

    request_id: str
    completions: list[Completion]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class TraceContext:
    """The span in which a request was made, of a trace that is recorded (W3C Trace Context): ids in hexadecimal, and
    what vendors keep in `state`. `epoch_ns` is the Unix time at which `time.monotonic()` was 0, by the clock as it was
    when the trace began here: with it, all times of a trace are on one clock."""

    trace_id: str
    span_id: str
    state: str = ""
    epoch_ns: int = 0


@dataclass(frozen=True, slots=True)
class StageWork:
    """What a stage did for a request in one of its phases: the steps that the request was part of, and how long the
    stage computed in them, for this request and whoever else was in them."""

    phase: Phase
    stage: str
    steps: int
    busy_s: float


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """A request that has ended, for whoever counts or records it. Times are `time.monotonic()` seconds: when it was
    submitted, when its first token was first part of a step, when its first answer token came (None: it never did),
    and its end. `reason` is its finish reason: stop, length, abort or error. `trace` is where it belongs in a trace
    that is recorded; `work` is noted for those alone."""

    request_id: str
    reason: str
    prompt_tokens: int
    output_tokens: int
    submitted_s: float
    started_s: float | None
    first_token_s: float | None
    ended_s: float
    cached_tokens: int = 0
    preemptions: int = 0
    trace: TraceContext | None = None
    work: tuple[StageWork, ...] = ()
