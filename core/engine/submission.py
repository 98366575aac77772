"""From a prompt and its parameters to a request that the batcher takes, checked against the loaded model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from core.batching.sequence import RawAnswer, Request
from core.batching.sequence import Sequence as TokenSequence
from core.defaults import DEFAULT_OWNER
from core.errors import ContextLengthError, InvalidRequestError
from core.execution.sampler import derive_seed, fresh_seed
from core.models.tokenizer import Tokenizer
from core.parsers.families import OutputFormat
from core.request import SamplingParams


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What clients may know of the model being served. `max_model_len` is the longest prompt plus answer: the context,
    or all of the KV cache if that is smaller. `source` is what it was loaded by: a path or a hub id. `output_format` is
    how it writes tool calls and thoughts. `quantization` says how weights are quantized, if they are; `weight_bytes` is
    what all of them take.
    """

    name: str
    aliases: tuple[str, ...]
    path: Path
    created: int
    max_model_len: int
    vocab_size: int
    dtype: str
    num_parameters: int
    eos_token_ids: tuple[int, ...]
    generation_defaults: dict[str, Any]
    tokenizer: Tokenizer
    source: str = ""
    quantization: str = ""
    weight_bytes: int = 0
    output_format: OutputFormat = field(default_factory=OutputFormat)

    def knows(self, name: str) -> bool:
        """Whether clients may call the model by this name: its own, an alias, the last part of a hub id, or what it was
        loaded by. Slashes at the ends do not count, which URLs and file names add or lose."""
        names = (self.name, self.name.rpartition("/")[2], *self.aliases, self.source, str(self.path))
        asked = name.strip("/")
        return bool(asked) and any(asked == known.strip("/") for known in names)


def make_request(
    model: LoadedModel,
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    *,
    priority: int,
    request_id: str,
    default_seed: int | None,
    owner: str = DEFAULT_OWNER,
) -> Request:
    """A request of `owner` with its sequences. `default_seed` is for parameters without a seed; None: a fresh one.

    Raises `InvalidRequestError` or `ContextLengthError`.
    """
    tokens = list(prompt_token_ids)
    params.validate(model.vocab_size)
    check_prompt(tokens, model)
    if params.grammar is not None:
        model.tokenizer.grammars(model.eos_token_ids).check(params.grammar, "grammar")
    room = model.max_model_len - len(tokens)
    max_tokens = params.max_tokens if params.max_tokens is not None else room
    if max_tokens > room:
        raise ContextLengthError(
            f"This model's maximum context length is {model.max_model_len} tokens, but the prompt has {len(tokens)} "
            f"and {max_tokens} more were asked for.",
            param="max_tokens",
        )
    if params.num_sequences > params.n and params.logprobs is None:
        params = replace(params, logprobs=0)  # the best are chosen by log-probability
    request = Request(
        request_id=request_id,
        prompt_token_ids=tokens,
        params=params,
        max_tokens=max_tokens,
        priority=priority,
        stop_token_ids=frozenset(params.stop_token_ids),
        eos_token_ids=frozenset(model.eos_token_ids),
        prompt_logprobs=[None] if params.prompt_logprobs is not None else None,
        owner=owner,
    )
    seed = params.seed if params.seed is not None else default_seed
    if seed is None:
        seed = fresh_seed()
    request.sequences = [
        TokenSequence(request, index, derive_seed(seed, index), list(tokens)) for index in range(params.num_sequences)
    ]
    return request


def make_raw_request(
    model: LoadedModel, token_ids: Sequence[int], raw: RawAnswer, *, request_id: str, owner: str = DEFAULT_OWNER
) -> Request:
    """A request for numbers of its prompt. Raises `InvalidRequestError` or `ContextLengthError`."""
    tokens = list(token_ids)
    check_prompt(tokens, model, reserve=0)
    request = Request(request_id, tokens, SamplingParams(detokenize=False), 0, owner=owner, raw=raw)
    request.sequences = [TokenSequence(request, 0, 0, list(tokens))]
    return request


def check_prompt(tokens: Sequence[object], model: LoadedModel, *, reserve: int = 1) -> None:
    """A prompt has tokens, all of them in the vocabulary, and leaves room for `reserve` more."""
    if not tokens:
        raise InvalidRequestError("The prompt is empty.", param="prompt")
    check_length(len(tokens), model, reserve=reserve)
    vocab = model.vocab_size
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab:
            raise InvalidRequestError(
                f"Token ids must be integers from 0 to {vocab - 1}, got {token!r}.", param="prompt"
            )


def check_length(num_tokens: int, model: LoadedModel, *, reserve: int = 1, param: str = "prompt") -> None:
    """Raise `ContextLengthError` unless so many tokens leave room for `reserve` more."""
    if num_tokens + reserve > model.max_model_len:
        raise ContextLengthError(
            f"This model's maximum context length is {model.max_model_len} tokens, but {param} has {num_tokens}"
            f"{', and at least one more is generated' if num_tokens == model.max_model_len else ''}.",
            param=param,
        )
