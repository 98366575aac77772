"""Bodies of Ollama's routes."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from core.api.body import Integer, RequestModel, Unsupported
from core.api.openai.unsupported import SAMPLERS
from core.api.sampling import StopStrings

MAX_NAME = 4096
MAX_INPUTS = 2048
Think = bool | Literal["low", "medium", "high"]
Format = Literal["", "json"] | dict[str, Any]


class Options(RequestModel):
    """How tokens are chosen. What configures how Ollama loads a model (`num_ctx`, `num_gpu`, `num_thread`, ...) is for
    the server's settings here, and does nothing in a request."""

    unsupported: ClassVar[Unsupported] = {
        name: accepted for name, accepted in SAMPLERS.items() if name != "repeat_penalty"
    }

    num_predict: Integer | None = Field(None, ge=-2)
    temperature: float | None = None
    top_k: Integer | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: Integer | None = None
    stop: StopStrings | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repeat_penalty: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, given: Any) -> Any:
        """Wherever there are options. Raises `UnsupportedParameterError`."""
        if isinstance(given, dict):
            cls.refuse_unsupported(given)
        return given

    @property
    def sampling(self) -> dict[str, Any]:
        """The same in the names of our own parameters, those that are given."""
        values = self.model_dump(exclude_none=True, exclude={"num_predict", "repeat_penalty"})
        if self.num_predict is not None and self.num_predict >= 0:  # below, as many as there is room for
            values["max_tokens"] = self.num_predict
        if self.repeat_penalty is not None:
            values["repetition_penalty"] = self.repeat_penalty
        return values


class Message(RequestModel):
    """A message; arguments of calls are objects."""

    unsupported: ClassVar[Unsupported] = {"images": ([],)}

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: list[Any] | None = Field(None, max_length=0)
    tool_calls: list[dict[str, Any]] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class OllamaChatRequest(RequestModel):
    """`/api/chat`. It is streamed unless `stream` is false."""

    model: str = Field(max_length=MAX_NAME)
    messages: list[Message] | None = None
    tools: list[Any] | None = None
    format: Format | None = None
    options: Options | None = None
    stream: bool | None = None
    think: Think | None = None
    keep_alive: float | str | None = None
    logprobs: bool | None = None
    top_logprobs: Integer | None = None


class ShowRequest(RequestModel):
    """`/api/show`: the model's name, as `model` or by its older name."""

    model: str | None = Field(None, max_length=MAX_NAME)
    name: str | None = Field(None, max_length=MAX_NAME)
    verbose: bool | None = None


def _as_texts(value: Any) -> Any:
    """One text, or several. Raises ValueError for too many."""
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list) and len(texts) > MAX_INPUTS:
        raise ValueError(f"has {len(texts)} texts, more than the {MAX_INPUTS} that are taken at once")
    return texts


class EmbedRequest(RequestModel):
    """`/api/embed`. A text that is too long is cut, unless `truncate` is false."""

    model: str = Field(max_length=MAX_NAME)
    input: Annotated[
        list[str],
        BeforeValidator(_as_texts, json_schema_input_type=str | Annotated[list[str], Field(max_length=MAX_INPUTS)]),
    ]
    truncate: bool | None = None
    dimensions: Integer | None = Field(None, ge=1)
    options: Options | None = None
    keep_alive: float | str | None = None
