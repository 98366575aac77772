"""Bodies of the `/v1` routes: OpenAI's fields, and those that vLLM and llama.cpp add to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator

from core.api.body import NOTHING, Integer, RequestModel, Unsupported, whole
from core.api.openai import unsupported
from core.api.openai.effort import Effort
from core.api.sampling import SamplingFields
from core.errors import InvalidRequestError

Prompt = str | list[int]
Prompts = Annotated[Any, BeforeValidator(whole, json_schema_input_type=Prompt | list[str] | list[list[int]] | None)]


class StreamOptions(RequestModel):
    """`include_usage`: a last chunk says what was used; `continuous_usage_stats`: each says what was used so far."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


FORM_FIELDS = (
    "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "guided_whitespace_pattern", "guided_decoding_backend", "json_schema", "grammar",
)  # fmt: skip


class OpenAIFields(SamplingFields):
    """What both kinds of completion know beside the sampling parameters."""

    instead: ClassVar[Mapping[str, str]] = unsupported.INSTEAD

    max_tokens: Integer | None = None
    max_completion_tokens: Integer | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_whitespace_pattern: str | None = None
    guided_decoding_backend: str | None = None
    json_schema: dict[str, Any] | None = None
    grammar: str | None = None

    @property
    def has_form(self) -> bool:
        """Whether it says anything of the answer's form; `core.api.openai.structured` reads what."""
        return any(map(self.model_fields_set.__contains__, FORM_FIELDS))

    @property
    def limit(self) -> int | None:
        """The most tokens to generate: `max_completion_tokens`, or else its older name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def limit_name(self) -> str:
        """Which of the two the client used."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def usage_chunks(self) -> dict[str, bool]:
        """Which chunks of a stream say what was used: the arguments of a `ChoiceStream`."""
        options = self.stream_options or StreamOptions()
        return {
            "include_usage": bool(options.include_usage), "continuous_usage": bool(options.continuous_usage_stats),
        }  # fmt: skip

    def check_stream_options(self) -> None:
        """Raise `InvalidRequestError` if there are any, and nothing to stream."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options needs stream to be true.", param="stream_options")


class CompletionFields(OpenAIFields):
    """A text completion without its prompt."""

    unsupported: ClassVar[Unsupported] = unsupported.COMPLETION

    logprobs: Integer | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None


class CompletionRequest(CompletionFields):
    """`/v1/completions`. `prompt` is text, a list of texts, token ids, or a list of token id lists."""

    prompt: Prompts = None


class BatchRequest(CompletionFields):
    """`/v1/batch/completions`. Each of `prompts` is text or token ids."""

    unsupported: ClassVar[Unsupported] = {**unsupported.COMPLETION, "stream": (False,), "stream_options": NOTHING}

    prompts: Annotated[list[Any], BeforeValidator(whole, json_schema_input_type=list[str] | list[list[int]])]


class TemplateFields(RequestModel):
    """How messages are put into the model's chat template. `core.api.openai.tools` looks into `tools`."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Effort | None = None
    tools: list[Any] | None = None


class ChatMessage(RequestModel):
    """`content` is text or a list of text parts; `core.api.openai.chat` looks into it and into calls."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Any = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    function_call: dict[str, Any] | None = None
    tool_call_id: str | None = None


class ChatRequest(OpenAIFields, TemplateFields):
    """`/v1/chat/completions`."""

    unsupported: ClassVar[Unsupported] = unsupported.CHAT

    messages: list[ChatMessage]
    logprobs: bool | None = None
    top_logprobs: Integer | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None

    @classmethod
    def refuse_unsupported(cls, body: Mapping[str, Any]) -> None:
        """Functions that must not be called are none."""
        unused = {"functions"} if body.get("function_call") == "none" else set()
        super().refuse_unsupported({name: value for name, value in body.items() if name not in unused})
