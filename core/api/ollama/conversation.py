"""From Ollama's requests to chat requests."""

from __future__ import annotations

from typing import Any

from core.api.body import to_json
from core.api.context import served_model
from core.api.ollama.schemas import Message, OllamaChatRequest, Think
from core.api.openai.schemas import ChatRequest
from core.api.translated import Names, chat_request, thinking_kwargs
from core.engine.submission import LoadedModel
from core.errors import InvalidRequestError, UnsupportedParameterError

NAMES: Names = (
    (r"^max_tokens", "options.num_predict"),
    (r"^repetition_penalty", "options.repeat_penalty"),
    (r"^(temperature|top_k|top_p|min_p|seed|stop|presence_penalty|frequency_penalty)", r"options.\1"),
    (r"^response_format", "format"),
    (r"^reasoning_effort", "think"),
    (r"^prompt$", "messages"),
)


def plain_name(name: str) -> str:
    """A model's name without the tag that Ollama's clients add where there is none."""
    return name.removesuffix(":latest")


def read_conversation(fields: OllamaChatRequest) -> ChatRequest:
    """The request as a chat request. Raises `InvalidRequestError`."""
    model = served_model(plain_name(fields.model))
    body: dict[str, Any] = {
        "model": plain_name(fields.model),
        "messages": _messages(fields.messages or []),
        "stream": fields.stream is not False,
        "tools": fields.tools or None,
        "logprobs": fields.logprobs,
        "top_logprobs": fields.top_logprobs,
        **think_fields(fields.think, model),
        **(fields.options.sampling if fields.options is not None else {}),
    }
    if fields.format == "json":
        body["response_format"] = {"type": "json_object"}
    elif fields.format:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "format", "schema": fields.format}}
    return chat_request(body)


def think_fields(think: Think | None, model: LoadedModel) -> dict[str, Any]:
    """What the template is told of whether to think, and how much."""
    if think is None:
        return {}
    if isinstance(think, str):
        return {"reasoning_effort": think}
    if think and model.output_format.reasoning_parser is None:
        raise UnsupportedParameterError(f"{model.name} does not support thinking.", param="think")
    return thinking_kwargs(think, model, "think")


def _messages(messages: list[Message]) -> list[dict[str, Any]]:
    """In Ollama, results name their tool, and belong to its calls in their order; here they name the call."""
    found: list[dict[str, Any]] = []
    waiting: list[tuple[str, str]] = []
    for index, message in enumerate(messages):
        param = f"messages[{index}]"
        values: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.thinking is not None:
            values["reasoning_content"] = message.thinking
        if message.tool_calls:
            calls = [_call(call, f"{param}.tool_calls[{number}]", f"call_{index}_{number}")
                     for number, call in enumerate(message.tool_calls)]  # fmt: skip
            values |= {"tool_calls": calls, "content": message.content or None}
            waiting = [(call["function"]["name"], call["id"]) for call in calls]
        elif values["content"] is None:
            values["content"] = ""
        if message.role == "tool":
            answered = next((pair for pair in waiting if message.tool_name in (None, pair[0])), None)
            if answered is not None:
                waiting.remove(answered)
            values["tool_call_id"] = message.tool_call_id or (answered[1] if answered is not None else "call")
            if message.tool_name is not None:
                values["name"] = message.tool_name
        found.append(values)
    return found


def _call(call: dict[str, Any], param: str, call_id: str) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRequestError(f"{param}.function must be an object with a name.", param=f"{param}.function")
    arguments = function.get("arguments")
    given = call.get("id")
    return {
        "id": given if isinstance(given, str) and given else call_id,
        "type": "function",
        "function": {
            "name": function["name"],
            "arguments": arguments if isinstance(arguments, str) else to_json(arguments or {}),
        },
    }
