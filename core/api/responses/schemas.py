"""Bodies of the Responses API."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from core.api.body import NOTHING, Integer, ModelName, RequestModel, TextOrObjects, Unsupported
from core.api.openai.effort import Effort
from core.errors import InvalidRequestError, UnsupportedParameterError

UNSUPPORTED: Unsupported = {
    "context_management": ([],),
    "conversation": NOTHING,
    "moderation": NOTHING,
    "prompt": NOTHING,
}
LOGPROBS = "message.output_text.logprobs"
Include = Literal[
    "message.output_text.logprobs", "reasoning.encrypted_content", "code_interpreter_call.outputs",
    "computer_call_output.output.image_url", "file_search_call.results", "message.input_image.image_url",
    "web_search_call.action.sources", "web_search_call.results",
]  # fmt: skip
"""What may be asked for beside the answer. Log-probabilities are given; of the others there is nothing here, since
thoughts are not encrypted and no tool runs in the server."""


class Reasoning(RequestModel):
    """`effort` for templates that look at it. Thoughts come as they are, whichever `summary` is asked for."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class TextFormat(RequestModel):
    """`format` constrains the answer."""

    format: dict[str, Any] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponseStreamOptions(RequestModel):
    """`include_obfuscation` asks for padding that hides how long deltas are, which there is none of."""

    include_obfuscation: bool | None = None


class ResponseRequest(RequestModel):
    """`/v1/responses`. `core.api.responses.items` looks into `input`, which may be left out where a conversation goes
    on."""

    unsupported: ClassVar[Unsupported] = UNSUPPORTED

    model: ModelName | None = None
    input: TextOrObjects | None = None
    instructions: str | None = None
    previous_response_id: Annotated[str, Field(max_length=128)] | None = None
    background: bool | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Integer | None = Field(None, ge=1)
    max_output_tokens: Integer | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: Integer | None = Field(None, ge=0, le=20)
    text: TextFormat | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["auto", "disabled"] | None = None
    include: list[Include] | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        None, max_length=16
    )
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default", "fast", "flex", "priority", "scale"] | None = None

    def check_background(self) -> None:
        """Raises `InvalidRequestError` for what cannot go together: a response in the background is one that is kept,
        and asked for later."""
        if self.background and self.store is False:
            raise InvalidRequestError("background needs store: the response is asked for later.", param="store")
        if self.background and self.stream:
            raise UnsupportedParameterError(
                "A response in the background is not streamed here: GET /v1/responses/<id> says how far it is.",
                param="stream",
            )

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.top_logprobs) or LOGPROBS in (self.include or ())
