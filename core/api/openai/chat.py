"""`POST /v1/chat/completions`, and messages as chat templates take them: plain dictionaries whose content is text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flask import Blueprint, Response

from core.api.body import json_response, parse_object, read_request, reads
from core.api.context import others_answer, served_model
from core.api.generation import (
    ChoiceStream,
    Generation,
    Usage,
    choice,
    envelope,
    finite,
    start_generation,
    stream_response,
)
from core.api.openai.schemas import ChatMessage, ChatRequest, TemplateFields
from core.api.sampling import sampling_params
from core.api.upstreams import answered
from core.errors import InvalidRequestError, UnsupportedParameterError
from core.request import RequestOutput, SamplingParams, SequenceDelta, TokenLogprob
from core.security.access import policy

if TYPE_CHECKING:
    from core.api.openai.answers import AnswerReader
    from core.engine.submission import LoadedModel
    from core.models.tokenizer import Tokenizer

blueprint = Blueprint("openai_chat", __name__)


@blueprint.post("/v1/chat/completions")
@policy("user", waits=True)
@reads(ChatRequest)
def create_chat_completion() -> Response:
    return answered("chat/completions", _complete_here) if others_answer() else _complete_here()


def _complete_here() -> Response:
    fields = read_request(ChatRequest)
    job = ChatJob.prepare(fields)
    model, reader = job.model, job.reader
    generation = job.start("chatcmpl", {"prompt": "messages", "max_tokens": fields.limit_name})
    if fields.stream:
        head = envelope(generation.id, "chat.completion.chunk", model, fields.model)
        return stream_response(generation, ChatStream(fields, model, head, reader))
    with closing(generation):
        (result,) = generation.gather()
    usage = Usage()
    usage.add_result(result)
    head = envelope(generation.id, "chat.completion", model, fields.model)
    choices, thoughts = [], []
    for completion in result.completions:
        message: dict[str, Any] = {"role": "assistant", "content": completion.text, "refusal": None}
        reason: str | None = completion.finish_reason
        if reader is not None:
            message, reason = reader.message(generation.id, completion)
            thoughts.append(message.get("reasoning_content", ""))
        logprobs = token_logprobs(fields, model, completion.logprobs)
        choices.append(choice(completion.index, {"message": message}, logprobs, reason, completion.stop_reason))
    if reader is not None:
        usage.reasoning_tokens = reader.count_thoughts(thoughts, usage.completion_tokens)
    return json_response({**head, "choices": choices, "usage": usage.to_openai()})


@dataclass(slots=True)
class ChatJob:
    """A conversation that is ready for the engine, in whichever API's words it came. `reader` finds calls and thoughts
    in the answer."""

    fields: ChatRequest
    model: LoadedModel
    reader: AnswerReader | None
    params: SamplingParams
    token_ids: list[int]

    @property
    def room(self) -> int:
        """How many tokens fit after the prompt; at least 1, for the pipeline to refuse."""
        return max(1, self.model.max_model_len - len(self.token_ids))

    def cap(self) -> bool:
        """For APIs whose limit is one that an answer may never come to: make it what fits. Returns whether it was
        more."""
        limit = self.params.max_tokens
        self.params = replace(self.params, max_tokens=min(limit or self.room, self.room))
        return limit is not None and limit > self.room

    @property
    def fits(self) -> bool:
        """Whether the context holds the prompt and the longest answer."""
        return len(self.token_ids) + (self.params.max_tokens or 1) <= self.model.max_model_len

    @classmethod
    def prepare(cls, fields: ChatRequest, *, always_read: bool = False) -> ChatJob:
        """Nothing is allocated yet. `always_read`: there is a reader, also where it will find text alone."""
        model = served_model(fields.model)
        tools, reader = _tools(fields, model, always_read=always_read)
        params = _params(fields, model, reader)
        token_ids = encode_messages(fields.messages, model, fields, tools)
        if reader is not None:
            reader.read_prompt(token_ids, _continued(fields))
        if fields.has_form or (reader is not None and reader.keeps_calls):
            from core.api.openai.constrained import constrain

            params = constrain(params, fields, model, reader)
        return cls(fields, model, reader, params, token_ids)

    def start(self, prefix: str, names: Mapping[str, str]) -> Generation:
        """Submit it; see `start_generation`."""
        requests = [(self.token_ids, self.params)]
        return start_generation(requests, self.model, prefix=prefix, priority=self.fields.priority, names=names)


def _tools(
    fields: ChatRequest, model: LoadedModel, *, always_read: bool
) -> tuple[list[dict[str, Any]] | None, AnswerReader | None]:
    """Tools for the prompt, and what reads calls and thoughts in the answers: neither, for most requests."""
    offer = None
    if fields.tools or fields.tool_choice is not None:
        from core.api.openai.tools import read_offer

        offer = read_offer(fields.tools, fields.tool_choice, fields.parallel_tool_calls, model)
    if offer is None and model.output_format.reasoning_parser is None and not always_read:
        return None, None
    from core.api.openai.answers import AnswerReader

    return offer.shown if offer is not None else None, AnswerReader(model, offer)


def _continued(fields: ChatRequest) -> str | None:
    """The text of the message that the answer goes on with."""
    content = fields.messages[-1].content if fields.continue_final_message else None
    return _text(content, "messages") if content else None


def _params(fields: ChatRequest, model: LoadedModel, reader: AnswerReader | None) -> SamplingParams:
    if fields.top_logprobs and not fields.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
    fields.check_stream_options()
    names = {"logprobs": "top_logprobs", "max_tokens": fields.limit_name}
    logprobs = (fields.top_logprobs or 0) if fields.logprobs else None
    kept = reader.kept_tokens if reader is not None else ()
    return sampling_params(
        fields, model, names, max_tokens=fields.limit, logprobs=logprobs, kept_special_tokens=kept
    )  # fmt: skip


class ChatStream(ChoiceStream):
    """Chunks of a streamed chat completion: the role, text as it comes, then one chunk with the finish reason. A
    `reader` finds calls and thoughts in the text."""

    def __init__(
        self, fields: ChatRequest, model: LoadedModel, head: dict[str, Any], reader: AnswerReader | None = None
    ) -> None:
        super().__init__(head, **fields.usage_chunks)
        self._fields = fields
        self._model = model
        self._read = reader.chunks(head["id"]) if reader is not None else None
        self._started = False

    def chunks(self, index: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        self._usage.add_prompt(index, output)
        if not self._started:
            self._started = True
            for number in range(self._fields.n or 1):
                yield self._chunk(choice(number, {"delta": {"role": "assistant", "content": "", "refusal": None}}))
        for delta in output.deltas:
            yield from self._delta_chunks(delta)

    def closing(self) -> Iterator[dict[str, Any]]:
        if self._include_usage and self._read is not None:
            self._usage.reasoning_tokens = self._read.count_thoughts(self._usage.completion_tokens)
        return super().closing()

    def _delta_chunks(self, delta: SequenceDelta) -> Iterator[dict[str, Any]]:
        self._usage.add_delta(delta)
        logprobs = token_logprobs(self._fields, self._model, delta.logprobs) if delta.logprobs else None
        if self._read is not None:
            for found in self._read.choices(delta, logprobs):
                yield self._chunk(found)
            return
        if delta.text or logprobs is not None:
            yield self._chunk(choice(delta.index, {"delta": {"content": delta.text}}, logprobs))
        if delta.finish_reason is not None:
            yield self._chunk(choice(delta.index, {"delta": {}}, None, delta.finish_reason, delta.stop_reason))


def token_logprobs(fields: ChatRequest, model: LoadedModel, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
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


def encode_messages(
    messages: Sequence[ChatMessage],
    model: LoadedModel,
    fields: TemplateFields,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
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
    given = template_messages(messages)
    if model.output_format.tool_parser is not None and any(message.keys() & HISTORY for message in given):
        from core.api.openai.history import fit_messages

        given = fit_messages(given, model.output_format)
    kwargs = fields.chat_template_kwargs
    if fields.reasoning_effort is not None:
        from core.api.openai.effort import effort_kwargs

        kwargs = {**effort_kwargs(fields.reasoning_effort, model), **(kwargs or {})}
    token_ids = model.tokenizer.encode_chat(
        given,
        add_generation_prompt=generation_prompt,
        continue_final_message=continued,
        chat_template_kwargs=kwargs,
        tools=tools,
        context=model.max_model_len,
    )
    if not token_ids:
        raise InvalidRequestError("The messages have no tokens.", param="messages")
    return token_ids


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages for the template, in the roles that every template knows: a developer's is the system's, a function's
    result a tool's. Arguments of calls are objects; beside calls, content may be null."""
    if not messages:
        raise InvalidRequestError("messages must not be empty.", param="messages")
    return [_template_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


HISTORY = {"tool_calls", "tool_call_id", "reasoning_content"}
TEMPLATE_ROLES = {"developer": "system", "function": "tool"}


def _template_message(message: ChatMessage, param: str) -> dict[str, Any]:
    calls = [_call(call, f"{param}.tool_calls[{index}]") for index, call in enumerate(message.tool_calls or ())]
    if message.function_call is not None:
        calls.append({"type": "function", "function": _function(message.function_call, f"{param}.function_call")})
    content = message.content
    if content is None or content == []:
        content = None if calls else "" if message.role == "function" else message.refusal
        if content is None and not calls:
            raise InvalidRequestError(f"{param} has no content.", param=f"{param}.content")
    else:
        content = _text(content, f"{param}.content")
    values: dict[str, Any] = {"role": TEMPLATE_ROLES.get(message.role, message.role), "content": content}
    if calls:
        values["tool_calls"] = calls
    for name in ("name", "tool_call_id", "reasoning_content"):
        value = getattr(message, name)
        if value is not None:
            values[name] = value
    return values


def _call(call: dict[str, Any], param: str) -> dict[str, Any]:
    if call.get("type", "function") != "function":
        raise UnsupportedParameterError(f"{param}: this server reads calls of type function only.", param=param)
    return {**call, "type": "function", "function": _function(call.get("function"), f"{param}.function")}


def _function(function: Any, param: str) -> dict[str, Any]:
    """A called function's name, and its arguments as the object that templates expect.

    Clients send them as the text that a model wrote. Text that is no JSON object stays what it is.
    """
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRequestError(f"{param} must be an object with a name and arguments.", param=param)
    arguments = function.get("arguments")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    elif isinstance(arguments, str):
        with suppress(InvalidRequestError):
            arguments = parse_object(arguments.encode())
    elif not isinstance(arguments, dict):
        raise InvalidRequestError(f"{param}.arguments must be JSON, as a string.", param=f"{param}.arguments")
    return {**function, "arguments": arguments}


def _text(content: Any, param: str) -> str:
    """The content's text; text parts are joined by line breaks."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequestError(f"{param} must be text or a list of text parts.", param=param)
    return "\n".join(_part_text(part, f"{param}[{index}]") for index, part in enumerate(content))


def _part_text(part: Any, param: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise InvalidRequestError(f"{param} must be an object with a type.", param=param)
    if kind not in ("text", "refusal"):
        raise UnsupportedParameterError(f"{param}: this server reads parts of type text only.", param=param)
    if not isinstance(part.get(kind), str):
        raise InvalidRequestError(f"{param}.{kind} must be a string.", param=f"{param}.{kind}")
    return str(part[kind])
