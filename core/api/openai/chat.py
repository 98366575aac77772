"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from flask import Blueprint, Response

from core.api.answers import json_response
from core.api.body import read_request
from core.api.context import served_model
from core.api.generation import start_generation
from core.api.openai.format import Usage, chat_logprobs, envelope
from core.api.openai.messages import encode_messages
from core.api.openai.schemas import ChatRequest
from core.api.openai.sse import stream_response
from core.api.sampling import sampling_params
from core.errors import InvalidRequestError
from core.request import Completion, RequestOutput, SamplingParams, SequenceDelta, TokenLogprob

if TYPE_CHECKING:
    from core.engine.model_engine import LoadedModel

blueprint = Blueprint("openai_chat", __name__)


@blueprint.post("/v1/chat/completions")
def create_chat_completion() -> Response:
    fields = read_request(ChatRequest)
    model = served_model(fields.model)
    params = _params(fields, model)
    token_ids = encode_messages(
        fields.messages,
        model,
        add_generation_prompt=fields.add_generation_prompt,
        continue_final_message=fields.continue_final_message,
        chat_template_kwargs=fields.chat_template_kwargs,
    )
    generation = start_generation([(token_ids, params)], model, prefix="chatcmpl", priority=fields.priority)
    if fields.stream:
        head = envelope(generation.id, "chat.completion.chunk", model, fields.model)
        return stream_response(generation, ChatStream(fields, model, head))
    with closing(generation):
        (result,) = generation.gather()
    usage = Usage()
    usage.add_result(result)
    head = envelope(generation.id, "chat.completion", model, fields.model)
    choices = [_choice(fields, model, completion) for completion in result.completions]
    return json_response({**head, "choices": choices, "usage": usage.to_openai()})


def _params(fields: ChatRequest, model: LoadedModel) -> SamplingParams:
    if fields.top_logprobs is not None and not fields.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
    if fields.stream_options is not None and not fields.stream:
        raise InvalidRequestError("stream_options needs stream to be true.", param="stream_options")
    if fields.stream and fields.best_of is not None and fields.best_of > (fields.n or 1):
        raise InvalidRequestError("best_of above n cannot be streamed: the best are known at the end.", param="best_of")
    limit = fields.max_completion_tokens if fields.max_completion_tokens is not None else fields.max_tokens
    return sampling_params(
        fields, model, max_tokens=limit, logprobs=(fields.top_logprobs or 0) if fields.logprobs else None
    )


def _choice(fields: ChatRequest, model: LoadedModel, completion: Completion) -> dict[str, Any]:
    return {
        "index": completion.index,
        "message": {"role": "assistant", "content": completion.text, "refusal": None},
        "logprobs": _logprobs(fields, model, completion.logprobs),
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }


def _logprobs(fields: ChatRequest, model: LoadedModel, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    if not fields.logprobs:
        return None
    return chat_logprobs(model.tokenizer, logprobs, num_top=fields.top_logprobs or 0)


class ChatStream:
    """Chunks of a streamed chat completion: the role, text as it comes, then one chunk with the finish reason."""

    def __init__(self, fields: ChatRequest, model: LoadedModel, head: dict[str, Any]) -> None:
        self._fields = fields
        self._model = model
        self._head = {**head, "usage": None} if fields.include_usage else head
        self._usage = Usage()
        self._started = False

    def chunks(self, index: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        self._usage.add_output(index, output)
        if not self._started:
            self._started = True
            for choice in range(self._fields.n or 1):
                yield self._chunk(choice, {"role": "assistant", "content": "", "refusal": None})
        for delta in output.deltas:
            yield from self._delta_chunks(delta)

    def _delta_chunks(self, delta: SequenceDelta) -> Iterator[dict[str, Any]]:
        logprobs = _logprobs(self._fields, self._model, delta.logprobs) if delta.logprobs else None
        if delta.text or logprobs is not None:
            yield self._chunk(delta.index, {"content": delta.text}, logprobs=logprobs)
        if delta.finish_reason is not None:
            yield self._chunk(delta.index, {}, finish_reason=delta.finish_reason, stop_reason=delta.stop_reason)

    def closing(self) -> Iterator[dict[str, Any]]:
        if self._fields.include_usage:
            yield {**self._head, "choices": [], "usage": self._usage.to_openai()}

    def _chunk(
        self,
        choice: int,
        delta: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
        stop_reason: int | str | None = None,
    ) -> dict[str, Any]:
        shown = {
            "index": choice,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }
        return {**self._head, "choices": [shown]}
