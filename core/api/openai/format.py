"""Shapes of OpenAI's answers: log-probabilities, usage, and what all of them begin with."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from core.request import GenerationResult, RequestOutput, TokenLogprob

if TYPE_CHECKING:
    from core.engine.model_engine import LoadedModel
    from core.models.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0  # what OpenAI writes for a probability of 0, since JSON has no infinity


def envelope(generation_id: str, kind: str, model: LoadedModel, name: str | None) -> dict[str, Any]:
    """The head of an answer: id, object, time, and the model by the name that the client used for it."""
    return {
        "id": generation_id,
        "object": kind,
        "created": int(time.time()),
        "model": name or model.name,
        "system_fingerprint": fingerprint(model),
    }


def fingerprint(model: LoadedModel) -> str:
    """Changes with what would change the answers to a seeded request: the weights and their format."""
    text = f"{model.name}|{model.num_parameters}|{model.dtype}"
    return "fp_" + hashlib.sha256(text.encode()).hexdigest()[:10]


@dataclass(slots=True)
class Usage:
    """Tokens of an answer: each prompt counts once, generated tokens count also where `best_of` dropped them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    _seen: set[int] = field(default_factory=set)

    def add_result(self, result: GenerationResult) -> None:
        self.prompt_tokens += result.num_prompt_tokens
        self.cached_tokens += result.num_cached_tokens
        self.completion_tokens += result.num_generated_tokens

    def add_output(self, index: int, output: RequestOutput) -> None:
        """Count one output of the engine request `index`."""
        if index not in self._seen:
            self._seen.add(index)
            self.prompt_tokens += output.num_prompt_tokens
            self.cached_tokens += output.num_cached_tokens
        self.completion_tokens += sum(len(delta.token_ids) for delta in output.deltas)

    def to_openai(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class TextOffsets:
    """Where each token's text begins in a choice's text, in characters.

    Counted by detokenizing step by step, because a token's own text need not be what it adds: a character may be
    spread over several tokens, which then all begin where it does.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._stream = tokenizer.stream(list(prompt_token_ids), skip_special_tokens=skip_special_tokens)
        self._length = 0

    def start_at(self, length: int) -> None:
        self._length = length

    def push(self, token_id: int) -> int:
        offset = self._length
        self._length += len(self._stream.push(token_id))
        return offset


def completion_logprobs(
    tokenizer: Tokenizer,
    token_ids: Iterable[int],
    logprobs: Iterable[TokenLogprob | None],
    offsets: TextOffsets,
    *,
    num_top: int,
) -> dict[str, list[Any]]:
    """`logprobs` of a text completion: four lists, one entry per token; the first token of a prompt has none."""
    values: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token_id, logprob in zip(token_ids, logprobs, strict=True):
        values["tokens"].append(token_name(tokenizer, token_id))
        values["text_offset"].append(offsets.push(token_id))
        if logprob is None:
            values["token_logprobs"].append(None)
            values["top_logprobs"].append(None)
            continue
        values["token_logprobs"].append(finite(logprob.logprob))
        # The token itself is always among them, so there may be one more than asked for.
        top = {**dict(logprob.top[:num_top]), token_id: logprob.logprob}
        names: dict[str, float] = {}
        for top_id, value in sorted(top.items(), key=lambda item: -item[1]):
            names.setdefault(token_name(tokenizer, top_id), finite(value))
        values["top_logprobs"].append(names)
    return values


def chat_logprobs(tokenizer: Tokenizer, logprobs: Iterable[TokenLogprob], *, num_top: int) -> dict[str, Any]:
    """`logprobs` of a chat completion: one entry per token, each with its bytes and the alternatives."""
    content = []
    for logprob in logprobs:
        entry = _chat_entry(tokenizer, logprob.token_id, logprob.logprob)
        entry["top_logprobs"] = [_chat_entry(tokenizer, *top) for top in logprob.top[:num_top]]
        content.append(entry)
    return {"content": content, "refusal": None}


def _chat_entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": finite(logprob),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text; one that is part of a character is written as OpenAI does, `bytes:\\xe2\\x82`."""
    text = tokenizer.token_text(token_id)
    if "\ufffd" not in text:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in tokenizer.token_bytes(token_id))


def finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB) if not math.isnan(logprob) else LEAST_LOGPROB
