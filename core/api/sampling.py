"""From request fields to `SamplingParams`, and from prompts to token ids.

Known fields are typed strictly ("1" and true are no integers).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from core.api.body import MAX_COUNT, ModelName, RequestModel
from core.errors import InvalidRequestError
from core.request import (
    MAX_LOGIT_BIAS,
    MAX_N,
    MAX_SEED,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)

if TYPE_CHECKING:
    from core.engine.model_engine import LoadedModel

MODEL_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # of generation_config.json
COPIED = (
    "n",
    "best_of",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "stop",
    "stop_token_ids",
    "min_tokens",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "seed",
)


_TOKEN_KEY = re.compile(r"[0-9]{1,10}")


def _strings(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list):
        return tuple(value)
    raise ValueError("Input should be a string or a list of strings")


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _token_keys(value: dict[str, float]) -> dict[int, float]:
    for key in value:
        if not _TOKEN_KEY.fullmatch(key):
            raise ValueError("Keys should be token ids, as strings")
    return {int(key): bias for key, bias in value.items()}


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
StopStrings = Annotated[tuple[StopString, ...], BeforeValidator(_strings), Field(max_length=MAX_STOP_STRINGS)]
TokenId = Annotated[int, Field(ge=0, le=MAX_COUNT)]
StopTokenIds = Annotated[tuple[TokenId, ...], BeforeValidator(_as_tuple), Field(max_length=MAX_STOP_TOKEN_IDS)]
LogitBias = Annotated[dict[str, float], Field(max_length=MAX_LOGIT_BIAS), AfterValidator(_token_keys)]


class SamplingFields(RequestModel):
    """How tokens are chosen, in names that every generating route shares. None means: left out."""

    model: ModelName | None = None
    n: int | None = Field(None, ge=1, le=MAX_N)
    best_of: int | None = Field(None, ge=1, le=MAX_N)
    temperature: float | None = Field(None, ge=0.0, le=2.0)
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    top_k: int | None = Field(None, ge=-1, le=MAX_COUNT)
    min_p: float | None = Field(None, ge=0.0, le=1.0)
    presence_penalty: float | None = Field(None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(None, ge=-2.0, le=2.0)
    repetition_penalty: float | None = Field(None, gt=0.0, le=10.0)
    seed: int | None = Field(None, ge=-MAX_SEED - 1, le=MAX_SEED)
    logit_bias: LogitBias | None = None
    stop: StopStrings | None = None
    stop_token_ids: StopTokenIds | None = None
    min_tokens: int | None = Field(None, ge=0, le=MAX_COUNT)
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    priority: int | None = Field(None, ge=-MAX_COUNT, le=MAX_COUNT)
    stream: bool | None = None


def sampling_params(fields: SamplingFields, model: LoadedModel, **others: Any) -> SamplingParams:
    """What the request says; where it says nothing, the model's own defaults, then OpenAI's.

    `others` are the parameters that each route reads in its own way (max_tokens, logprobs, ...).
    """
    values = {name: getattr(fields, name) for name in (*COPIED, *MODEL_DEFAULTS)}
    for name in MODEL_DEFAULTS:
        if values[name] is None:
            values[name] = model.generation_defaults.get(name)
    if values["top_k"] == -1:  # vLLM's way of writing off
        values["top_k"] = 0
    values.update(others)
    best_of, n = values["best_of"], values["n"] or 1
    if best_of is not None and best_of > n and values.get("logprobs") is None:
        values["logprobs"] = 0  # the best are chosen by log-probability
    return SamplingParams(**{name: value for name, value in values.items() if value is not None})


def default_max_tokens(prompt_token_ids: Sequence[int], model: LoadedModel, default: int) -> int:
    """`default`, or what is left of the context if that is less; at least 1, for the pipeline to refuse."""
    return max(1, min(default, model.max_model_len - len(prompt_token_ids)))


def encode_prompt(prompt: str | list[int], model: LoadedModel, *, add_special_tokens: bool, param: str) -> list[int]:
    """Token ids of a prompt, none of them out of range. Raises `InvalidRequestError`, also for an empty prompt."""
    if not prompt:
        raise InvalidRequestError(f"{param} must not be empty.", param=param)
    if isinstance(prompt, list):
        return check_token_ids(prompt, model, param=param)
    token_ids = model.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
    if not token_ids:
        raise InvalidRequestError(f"{param} has no tokens.", param=param)
    return token_ids


def check_token_ids(token_ids: list[int], model: LoadedModel, *, param: str) -> list[int]:
    """The ids unchanged, if all of them are in the vocabulary."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < model.vocab_size):
        raise InvalidRequestError(f"{param}: token ids lie between 0 and {model.vocab_size - 1}.", param=param)
    return token_ids
