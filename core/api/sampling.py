"""From request fields to `SamplingParams`, and from prompts to token ids.

Known fields are typed strictly ("1" and true are no integers; 1.0 is one).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from core.api.body import MAX_COUNT, Integer, ModelName, RequestModel, whole
from core.defaults import GENERATION_DEFAULTS
from core.engine.submission import check_length
from core.errors import InvalidRequestError
from core.request import SamplingParams

if TYPE_CHECKING:
    from core.engine.submission import LoadedModel

_TOKEN_KEY = re.compile(r"[0-9]{1,10}")


def _strings(value: Any) -> Any:
    if isinstance(value, str):
        return (value,) if value else ()
    if isinstance(value, (list, tuple)):
        return tuple(value)
    raise ValueError("Input should be a string or a list of strings")


def _as_tuple(value: Any) -> Any:
    return tuple(whole(value)) if isinstance(value, list) else value


def _token_keys(value: dict[str, float]) -> dict[int, float]:
    for key in value:
        if not _TOKEN_KEY.fullmatch(key):
            raise ValueError("Keys should be token ids, as strings")
    return {int(key): bias for key, bias in value.items()}


StopStrings = Annotated[tuple[str, ...], BeforeValidator(_strings, json_schema_input_type=str | list[str])]
TokenIds = Annotated[tuple[int, ...], BeforeValidator(_as_tuple)]
LogitBias = Annotated[dict[str, float], AfterValidator(_token_keys)]


class SamplingFields(RequestModel):
    """How tokens are chosen, in names that every generating route shares. None means: left out.

    Types alone: `SamplingParams.validate` says what is in range.
    """

    model: ModelName | None = None
    n: Integer | None = None
    best_of: Integer | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: Integer | None = None
    logit_bias: LogitBias | None = None
    stop: StopStrings | None = None
    stop_token_ids: TokenIds | None = None
    min_tokens: Integer | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    cache_prompt: bool | None = None
    priority: Integer | None = Field(None, ge=-MAX_COUNT, le=MAX_COUNT)
    stream: bool | None = None


def sampling_params(
    given: SamplingFields, model: LoadedModel, names: Mapping[str, str] | None = None, **others: Any
) -> SamplingParams:
    """What the request says; where it says nothing, the model's own defaults, then OpenAI's.

    `others` are the parameters that each route reads in its own way (max_tokens, logprobs, ...), `names` what its
    clients call them. Raises `InvalidRequestError` for what is out of range or contradictory.
    """
    known = type(given).model_fields
    values = {item.name: getattr(given, item.name) for item in fields(SamplingParams) if item.name in known}
    for name in GENERATION_DEFAULTS:
        if values[name] is None:
            values[name] = model.generation_defaults.get(name)
    if values["top_k"] == -1:  # vLLM's way of writing off
        values["top_k"] = 0
    if values["best_of"] == 0:  # OpenAI's
        values["best_of"] = None
    values.update(others)
    params = SamplingParams(**{name: value for name, value in values.items() if value is not None})
    params.validate(model.vocab_size, names)
    if given.stream and params.num_sequences > params.n:
        raise InvalidRequestError("best_of above n cannot be streamed: the best are known at the end.", param="best_of")
    return params


def default_max_tokens(prompt_token_ids: Sequence[int], model: LoadedModel, default: int) -> int:
    """`default`, or what is left of the context if that is less; at least 1, for the pipeline to refuse."""
    return max(1, min(default, model.max_model_len - len(prompt_token_ids)))


def encode_prompt(prompt: str | list[int], model: LoadedModel, *, add_special_tokens: bool, param: str) -> list[int]:
    """Token ids of a prompt, none of them out of range.

    Raises `InvalidRequestError`, also for an empty prompt, and `ContextLengthError` for a text that cannot fit.
    """
    if not prompt:
        raise InvalidRequestError(f"{param} must not be empty.", param=param)
    if isinstance(prompt, list):
        check_length(len(prompt), model, param=param)
        return check_token_ids(prompt, model, param=param)
    token_ids = encode_text(prompt, model, add_special_tokens=add_special_tokens, param=param)
    if not token_ids:
        raise InvalidRequestError(f"{param} has no tokens.", param=param)
    return token_ids


def encode_text(text: str, model: LoadedModel, *, add_special_tokens: bool, param: str) -> list[int]:
    """Token ids of a text, which may be empty."""
    try:
        return model.tokenizer.encode(text, add_special_tokens=add_special_tokens, context=model.max_model_len)
    except InvalidRequestError as error:
        error.param = param
        raise


def check_token_ids(token_ids: list[int], model: LoadedModel, *, param: str) -> list[int]:
    """The ids unchanged, if all of them are in the vocabulary."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < model.vocab_size):
        raise InvalidRequestError(f"{param}: token ids lie between 0 and {model.vocab_size - 1}.", param=param)
    return token_ids
