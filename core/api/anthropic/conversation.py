"""From Anthropic's requests to chat requests."""

from __future__ import annotations

from typing import Any

from core.api.anthropic.schemas import CountRequest, InputMessage, MessagesRequest, Tool
from core.api.body import to_json
from core.api.context import served_model
from core.api.openai.schemas import ChatRequest
from core.api.translated import Names, chat_request, choice_of, thinking_kwargs
from core.engine.submission import LoadedModel
from core.errors import InvalidRequestError, UnsupportedParameterError

NAMES: Names = (
    (r"^(tools\[\d+\])\.function\.parameters", r"\1.input_schema"),
    (r"^(tools\[\d+\])\.function\b\.?", r"\1."),
    (r"^tool_choice\.function\.name", "tool_choice.name"),
    (r"^stop$", "stop_sequences"),
    (r"^response_format", "output_config.format"),
    (r"^reasoning_effort", "output_config.effort"),
    (r"^prompt$", "messages"),
)


def read_conversation(fields: CountRequest) -> ChatRequest:
    """The request as a chat request.

    Raises:
        InvalidRequestError: a block that is malformed, or is no text, call or result.
        UnsupportedParameterError: what the model or this server cannot do.
    """
    model = served_model(fields.model)
    messages = []
    if fields.system:
        messages.append({"role": "system", "content": _text(fields.system, "system")})
    for index, message in enumerate(fields.messages):
        messages += _messages(message, f"messages[{index}]")
    continued = messages[-1]["role"] == "assistant"
    if continued and "tool_calls" in messages[-1]:
        raise InvalidRequestError("The last message calls tools; their results must follow.", param="messages")
    body: dict[str, Any] = {
        "model": fields.model,
        "messages": messages,
        "continue_final_message": continued or None,
        **_tools(fields),
        **_output(fields, model),
    }
    if fields.thinking is not None:  # not asked, a model thinks as it does
        body |= thinking_kwargs(fields.thinking.type != "disabled", model, "thinking.type")
    if isinstance(fields, MessagesRequest):
        for name in ("max_tokens", "temperature", "top_p", "top_k", "stream"):
            body[name] = getattr(fields, name)
        body["stop"] = fields.stop_sequences
    return chat_request(body)


def _messages(message: InputMessage, param: str) -> list[dict[str, Any]]:
    """A message as OpenAI has it: results of tools are messages of their own there, in front of what follows them."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    found: list[dict[str, Any]] = []
    text: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, block in enumerate(message.content):
        where = f"{param}.content[{index}]"
        kind = block.get("type")
        if kind == "text":
            text.append(_string(block, "text", where))
        elif kind == "thinking" and message.role == "assistant":
            thoughts.append(_string(block, "thinking", where))
        elif kind == "redacted_thinking" and message.role == "assistant":
            continue  # of another service, which alone can read it
        elif kind == "tool_use" and message.role == "assistant":
            calls.append(_call(block, where))
        elif kind == "tool_result" and message.role == "user":
            found.append(_result(block, where))
        else:
            raise _not_read(kind, where)
    values: dict[str, Any] = {"role": message.role, "content": "\n".join(text)}
    if thoughts:
        values["reasoning_content"] = "\n".join(thoughts)
    if calls:
        values |= {"tool_calls": calls, "content": values["content"] or None}
    if text or thoughts or calls or not found:
        found.append(values)
    return found


def _call(block: dict[str, Any], param: str) -> dict[str, Any]:
    arguments = block.get("input", {})
    if not isinstance(arguments, dict):
        raise InvalidRequestError(f"{param}.input must be an object.", param=f"{param}.input")
    function = {"name": _string(block, "name", param), "arguments": to_json(arguments)}
    return {"id": _string(block, "id", param), "type": "function", "function": function}


def _result(block: dict[str, Any], param: str) -> dict[str, Any]:
    content = _text(block.get("content") or "", f"{param}.content")
    if block.get("is_error") is True:
        content = f"Error: {content}"
    return {"role": "tool", "tool_call_id": _string(block, "tool_use_id", param), "content": content}


def _text(content: Any, param: str) -> str:
    """Text, or the text of blocks of text, joined by line breaks as in chat completions."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequestError(f"{param} must be text or a list of blocks.", param=param)
    for index, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind != "text":
            raise _not_read(kind, f"{param}[{index}]")
    return "\n".join(_string(block, "text", f"{param}[{index}]") for index, block in enumerate(content))


def _string(block: dict[str, Any], name: str, param: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise InvalidRequestError(f"{param}.{name} must be a string.", param=f"{param}.{name}")
    return value


def _not_read(kind: Any, param: str) -> InvalidRequestError:
    if not isinstance(kind, str):
        return InvalidRequestError(f"{param} must be an object with a type.", param=param)
    return UnsupportedParameterError(
        f"{param}: this server reads text, thinking and tool_use of an assistant, text and tool_result of a user, and "
        f"text elsewhere, not {kind[:64]}.",
        param=param,
    )


def _tools(fields: CountRequest) -> dict[str, Any]:
    choice = fields.tool_choice
    values: dict[str, Any] = {"tools": [_tool(tool) for tool in fields.tools] if fields.tools else None}
    if choice is not None:
        kinds = {"any": "required", "tool": "function"}
        values["tool_choice"] = choice_of(kinds.get(choice.type, choice.type), choice.name)
        values["parallel_tool_calls"] = False if choice.disable_parallel_tool_use else None
    return values


def _tool(tool: Tool) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        return {"type": tool.type}
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": {**function, "strict": tool.strict}}


def _output(fields: CountRequest, model: LoadedModel) -> dict[str, Any]:
    config = fields.output_config
    if config is None:
        return {}
    effort = "xhigh" if config.effort == "max" else config.effort
    if effort == "high" and "reasoning_effort" not in model.tokenizer.template_variables:
        effort = None  # the default, which clients also send to models that have no efforts
    values: dict[str, Any] = {"reasoning_effort": effort}
    if config.format is not None:
        schema = {"name": "output", "schema": config.format.get("schema"), "strict": True}
        values["response_format"] = {"type": config.format.get("type"), "json_schema": schema}
    return values
