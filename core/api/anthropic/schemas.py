"""Bodies of Anthropic's routes."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from core.api.body import NOTHING, Integer, ModelName, RequestModel, TextOrObjects, Unsupported

UNSUPPORTED: Unsupported = {
    "container": NOTHING,
    "context_management": ({"edits": []}, {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}),
    "mcp_servers": ([],),
    "speed": ("standard",),
}


class InputMessage(RequestModel):
    """`content` is text or a list of blocks; `core.api.anthropic.conversation` looks into it."""

    role: Literal["user", "assistant", "system"]
    content: TextOrObjects


class Tool(RequestModel):
    """A tool of the client's. One of another `type` than custom is skipped: it runs at Anthropic's, or needs a model
    that knows it."""

    type: str | None = None
    name: Any = None
    description: Any = None
    input_schema: Any = None
    strict: Any = None


class ToolChoice(RequestModel):
    """Which tool is called: as the model likes, any, the named one, or none."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(RequestModel):
    """Whether the model thinks, where its template can tell it to or not to. `budget_tokens` is a target that is not
    enforced: `max_tokens` bounds thoughts and answer together."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Integer | None = Field(None, ge=1024)
    display: Literal["summarized", "omitted"] | None = None


class OutputConfig(RequestModel):
    """`effort` for templates that look at it; `format` constrains the answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: dict[str, Any] | None = None


class CountRequest(RequestModel):
    """`/v1/messages/count_tokens`."""

    unsupported: ClassVar[Unsupported] = UNSUPPORTED

    model: ModelName
    messages: list[InputMessage] = Field(min_length=1)
    system: TextOrObjects | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountRequest):
    """`/v1/messages`."""

    max_tokens: Integer
    stop_sequences: list[str] | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    stream: bool | None = None

    model_config = ConfigDict(json_schema_extra={"required": ["model", "messages", "max_tokens"]})
