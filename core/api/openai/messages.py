"""Chat messages as chat templates take them: plain dictionaries whose content is text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from core.api.openai.schemas import ChatMessage
from core.errors import InvalidRequestError, UnsupportedParameterError

if TYPE_CHECKING:
    from core.engine.model_engine import LoadedModel


def encode_messages(
    messages: Sequence[ChatMessage],
    model: LoadedModel,
    *,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation; the model's turn comes next unless the final message is to be continued.

    Raises:
        InvalidRequestError: no messages, or a content that is not text.
        ChatTemplateError: the model's template refuses the conversation.
    """
    continued = bool(continue_final_message)
    generation_prompt = not continued if add_generation_prompt is None else add_generation_prompt
    if continued and generation_prompt:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt cannot both be true.", param="continue_final_message"
        )
    token_ids = model.tokenizer.encode_chat(
        template_messages(messages),
        add_generation_prompt=generation_prompt,
        continue_final_message=continued,
        chat_template_kwargs=chat_template_kwargs,
    )
    if not token_ids:
        raise InvalidRequestError("The messages have no tokens.", param="messages")
    return token_ids


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages for the template. A developer's message is given as the system's, which every template knows."""
    if not messages:
        raise InvalidRequestError("messages must not be empty.", param="messages")
    return [_template_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _template_message(message: ChatMessage, param: str) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    if message.content is None and not message.tool_calls:
        raise InvalidRequestError(f"{param} has no content.", param=f"{param}.content")
    values: dict[str, Any] = {"role": role, "content": _text(message.content, f"{param}.content")}
    for name in ("name", "tool_calls", "tool_call_id"):
        value = getattr(message, name)
        if value is not None:
            values[name] = value
    return values


def _text(content: Any, param: str) -> str:
    """The content's text; text parts are joined by line breaks."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise InvalidRequestError(f"{param} must be text or a list of text parts.", param=param)
    return "\n".join(_part_text(part, f"{param}[{index}]") for index, part in enumerate(content))


def _part_text(part: Any, param: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise InvalidRequestError(f"{param} must be an object with a type.", param=param)
    if kind != "text":
        raise UnsupportedParameterError(f"{param}: this server reads parts of type text only.", param=param)
    if not isinstance(part.get("text"), str):
        raise InvalidRequestError(f"{param}.text must be a string.", param=f"{param}.text")
    return str(part["text"])
