"""What the request schemas have in common. Known fields are typed strictly ("1" and true are no integers)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from core.errors import UnsupportedParameterError
from core.request import (
    MAX_LOGIT_BIAS,
    MAX_N,
    MAX_SEED,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
)

MAX_COUNT = 2**31 - 1  # largest token count or id that makes sense anywhere
Unsupported = Mapping[str, tuple[Any, ...]]
MAX_NAME_LENGTH = 4096  # of a model: a path may be that long
NOTHING: tuple[Any, ...] = ()  # no value of the parameter is accepted but null

_TOKEN_KEY = re.compile(r"[0-9]{1,10}")


class RequestModel(BaseModel):
    """A request body. Fields it does not know are ignored, except those in `unsupported`.

    `unsupported` maps each parameter that clients know but this server does not honour to the values that ask for
    nothing special and are accepted beside null. A dot reaches into an object.
    """

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    unsupported: ClassVar[Unsupported] = {}

    @classmethod
    def refuse_unsupported(cls, body: Mapping[str, Any]) -> None:
        """Raise `UnsupportedParameterError` for a parameter that would have to be ignored."""
        for path, accepted in cls.unsupported.items():
            value: Any = body
            for name in path.split("."):
                value = value.get(name) if isinstance(value, Mapping) else None
            if value is not None and not any(type(value) is type(item) and value == item for item in accepted):
                raise UnsupportedParameterError(f"{path} is not supported by this server.", param=path)


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


ModelName = Annotated[str, Field(max_length=MAX_NAME_LENGTH)]
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
