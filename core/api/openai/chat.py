"""`POST /v1/chat/completions`, and messages as chat templates take them: plain dictionaries whose content is text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from flask import Blueprint, Response

from core.api.body import json_response, read_request
from core.api.context import served_model
from core.api.generation import ChoiceStream, Usage, choice, envelope, finite, start_generation, stream_response
from core.api.openai.schemas import ChatMessage, ChatRequest, TemplateFields
from core.api.sampling import sampling_params
from core.errors import InvalidRequestError, UnsupportedParameterError
from core.request import RequestOutput, SamplingParams, SequenceDelta, TokenLogprob
from core.security.access import policy

if TYPE_CHECKING:
    from core.engine.submission import LoadedModel
    from core.models.tokenizer import Tokenizer

blueprint = Blueprint("openai_chat", __name__)


@blueprint.post("/v1/chat/completions")
@policy("user", waits=True)
def create_chat_completion() -> Response:
    fields = read_request(ChatRequest)
    model = served_model(fields.model)
    params = _params(fields, model)
    token_ids = encode_messages(fields.messages, model, fields)
    generation = start_generation([(token_ids, params)], model, prefix="chatcmpl", priority=fields.priority)
    if fields.stream:
        head = envelope(generation.id, "chat.completion.chunk", model, fields.model)
        return stream_response(generation, ChatStream(fields, model, head))
    with closing(generation):
        (result,) = generation.gather()
    usage = Usage()
    usage.add_result(result)
    head = envelope(generation.id, "chat.completion", model, fields.model)
    choices = [
        choice(
            completion.index,
            {"message": {"role": "assistant", "content": completion.text, "refusal": None}},
            _logprobs(fields, model, completion.logprobs),
            completion.finish_reason,
            completion.stop_reason,
        )
        for completion in result.completions
    ]
    return json_response({**head, "choices": choices, "usage": usage.to_openai()})


def _params(fields: ChatRequest, model: LoadedModel) -> SamplingParams:
    if fields.top_logprobs is not None and not fields.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
    fields.check_stream_options()
    limit, names = fields.max_tokens, {"logprobs": "top_logprobs"}
    if fields.max_completion_tokens is not None:
        limit, names["max_tokens"] = fields.max_completion_tokens, "max_completion_tokens"
    return sampling_params(
        fields, model, names, max_tokens=limit, logprobs=(fields.top_logprobs or 0) if fields.logprobs else None
    )


class ChatStream(ChoiceStream):
    """Chunks of a streamed chat completion: the role, text as it comes, then one chunk with the finish reason."""

    def __init__(self, fields: ChatRequest, model: LoadedModel, head: dict[str, Any]) -> None:
        super().__init__(head, include_usage=fields.include_usage)
        self._fields = fields
        self._model = model
        self._started = False

    def chunks(self, index: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        self._usage.add_output(index, output)
        if not self._started:
            self._started = True
            for number in range(self._fields.n or 1):
                yield self._chunk(choice(number, {"delta": {"role": "assistant", "content": "", "refusal": None}}))
        for delta in output.deltas:
            yield from self._delta_chunks(delta)

    def _delta_chunks(self, delta: SequenceDelta) -> Iterator[dict[str, Any]]:
        logprobs = _logprobs(self._fields, self._model, delta.logprobs) if delta.logprobs else None
        if delta.text or logprobs is not None:
            yield self._chunk(choice(delta.index, {"delta": {"content": delta.text}}, logprobs))
        if delta.finish_reason is not None:
            yield self._chunk(choice(delta.index, {"delta": {}}, None, delta.finish_reason, delta.stop_reason))


def _logprobs(fields: ChatRequest, model: LoadedModel, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    """One entry per token, each with its bytes and the alternatives, if the client wants them."""
    if not fields.logprobs:
        return None
    content = []
    for logprob in logprobs:
        entry = _entry(model.tokenizer, logprob.token_id, logprob.logprob)
        entry["top_logprobs"] = [_entry(model.tokenizer, *top) for top in logprob.top[: fields.top_logprobs or 0]]
        content.append(entry)
    return {"content": content, "refusal": None}


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": finite(logprob),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


def encode_messages(messages: Sequence[ChatMessage], model: LoadedModel, fields: TemplateFields) -> list[int]:
    """Token ids of a conversation; the model's turn comes next unless the final message is to be continued.

    Raises:
        InvalidRequestError: no messages, or a content that is not text.
        ChatTemplateError: the model's template refuses the conversation.
    """
    continued = bool(fields.continue_final_message)
    generation_prompt = not continued if fields.add_generation_prompt is None else fields.add_generation_prompt
    if continued and generation_prompt:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt cannot both be true.", param="continue_final_message"
        )
    token_ids = model.tokenizer.encode_chat(
        template_messages(messages),
        add_generation_prompt=generation_prompt,
        continue_final_message=continued,
        chat_template_kwargs=fields.chat_template_kwargs,
        context=model.max_model_len,
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
