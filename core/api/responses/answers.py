"""Answers of the Responses API, whole and as the events of a stream.

Events come in this order, numbered from 0: `response.created` and `response.in_progress`; for each item
`response.output_item.added`, what it gains (`response.content_part.added`, deltas, their `done`,
`response.content_part.done`; of a call, deltas of its arguments and their `done`) and `response.output_item.done`; then
`response.completed` or `response.incomplete`. A stream that fails ends with `response.failed`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from core.api.generation import Usage
from core.api.openai.answers import reasoning_tokens
from core.api.openai.chat import ChatJob, token_logprobs
from core.api.responses.output import OutputItems
from core.api.responses.schemas import ResponseRequest, TextFormat
from core.api.translated import AnswerPieces, NamedEvents, hex_of
from core.errors import VRAMancerError
from core.request import GenerationResult, RequestOutput, SequenceDelta

STATUSES = {"stop": "completed", "tool_calls": "completed", "length": "incomplete", "abort": "cancelled"}


class ResponseWriter:
    """One response: its events as they come, or all of it. `keep` is told of it whenever its status changes."""

    def __init__(
        self,
        fields: ResponseRequest,
        job: ChatJob,
        generation_id: str,
        keep: Callable[[dict[str, Any]], None] = lambda response: None,
    ) -> None:
        self._fields = fields
        self._job = job
        self._keep = keep
        self._answer = AnswerPieces.of(job, generation_id)
        self._usage = Usage()
        self._number = 0
        hexes = hex_of(generation_id)
        self._items = OutputItems(hexes)
        self._response = _echo(fields, job, f"resp_{hexes}")

    def response(self, result: GenerationResult) -> dict[str, Any]:
        """The whole response."""
        self._usage.add_result(result)
        completion = result.completions[0]
        text = SequenceDelta(
            0, completion.text, logprobs=tuple(completion.logprobs), finish_reason=completion.finish_reason
        )
        for _ in self._changes(text):
            pass
        for _ in self._items.close(cut=self._cut):
            pass
        self._settle()
        return self._response

    def chunks(self, index: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        self._usage.add_output(index, output)
        if self._number == 0:
            yield from self.begin()
        for delta in output.deltas:
            for event in self._changes(delta):
                yield self._event(event)

    def queue(self) -> dict[str, Any]:
        """The response before anything of it has come, which is kept."""
        self._response["status"] = "queued"
        self._keep(self._response)
        return dict(self._response)

    def begin(self) -> Iterator[dict[str, Any]]:
        self._response = {**self._response, "status": "in_progress"}
        self._keep(self._response)
        for kind in ("response.created", "response.in_progress"):
            yield self._event({"type": kind, "response": self._response})

    def closing(self) -> Iterator[dict[str, Any]]:
        for event in self._items.close(cut=self._cut):
            yield self._event(event)
        self._settle()
        kind = "completed" if self._response["status"] == "completed" else "incomplete"
        yield self._event({"type": f"response.{kind}", "response": self._response})

    def failed(self, error: VRAMancerError) -> dict[str, Any]:
        """The last event of a stream that fails."""
        shown = error.to_openai()["error"]
        if self._number == 0 and not self._fields.background:
            return self._event({"type": "error", **{name: shown[name] for name in ("code", "message", "param")}})
        self._response |= {"error": {"code": "server_error", "message": shown["message"]}}
        self._end("failed")
        return self._event({"type": "response.failed", "response": self._response})

    def abandoned(self) -> None:
        """Its client has left, or its stream has ended: then nothing changes."""
        if self._number and self._response["status"] == "in_progress":
            self._end("cancelled")

    @property
    def _cut(self) -> bool:
        """Whether the answer was cut off."""
        return self._response["incomplete_details"] is not None or self._response["status"] == "cancelled"

    def _changes(self, delta: SequenceDelta) -> Iterator[dict[str, Any]]:
        if delta.logprobs:
            shown = token_logprobs(self._job.fields, self._job.model, delta.logprobs)
            self._items.add_logprobs(shown["content"] if shown is not None else [])
        for piece in self._answer.feed(delta.text):
            yield from self._items.add(piece)
        if delta.finish_reason is not None:
            for piece in self._answer.finish():
                yield from self._items.add(piece)
            reason = self._answer.finish_reason(delta.finish_reason) or "stop"
            if reason == "length":
                self._response["incomplete_details"] = {"reason": "max_output_tokens"}
            elif reason == "abort":
                self._response["status"] = "cancelled"

    def _settle(self) -> None:
        status = self._response["status"]
        if status == "in_progress":
            status = "incomplete" if self._response["incomplete_details"] is not None else "completed"
        self._end(status)

    def _end(self, status: str) -> None:
        self._response = {
            **self._response, "status": status, "output": list(self._items.items), "usage": self._used(),
        }  # fmt: skip
        if status == "completed":
            self._response["completed_at"] = int(time.time())
        self._keep(self._response)

    def _used(self) -> dict[str, Any]:
        """Tokens. Those of thoughts are counted in their text, without the tags around it."""
        usage = self._usage
        thoughts = reasoning_tokens(self._job.model, [self._items.thoughts], usage.completion_tokens)
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": thoughts},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }

    def _event(self, event: dict[str, Any]) -> dict[str, Any]:
        numbered = {**event, "sequence_number": self._number}
        self._number += 1
        return numbered


class ResponseEvents(NamedEvents):
    """Events of one response, of which the last may say how it failed."""

    def __init__(self, writer: ResponseWriter) -> None:
        self._writer = writer

    def error(self, error: VRAMancerError) -> str:
        return self.chunk(self._writer.failed(error))


def _echo(fields: ResponseRequest, job: ChatJob, response_id: str) -> dict[str, Any]:
    """A response that has just begun, with what was asked for; what was left out with the value that counted."""
    text, reasoning = fields.text or TextFormat(), fields.reasoning
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": bool(fields.background),
        "error": None,
        "incomplete_details": None,
        "instructions": fields.instructions,
        "max_output_tokens": fields.max_output_tokens,
        "max_tool_calls": fields.max_tool_calls,
        "metadata": fields.metadata or {},
        "model": fields.model or job.model.name,
        "output": [],
        "parallel_tool_calls": fields.parallel_tool_calls is not False,
        "previous_response_id": fields.previous_response_id,
        "prompt_cache_key": fields.prompt_cache_key,
        "reasoning": {"effort": reasoning.effort if reasoning else None,
                      "summary": reasoning.summary if reasoning else None},
        "safety_identifier": fields.safety_identifier,
        "service_tier": "default",
        "store": fields.store is not False,
        "temperature": job.params.temperature,
        "text": {"format": text.format or {"type": "text"}, "verbosity": text.verbosity or "medium"},
        "tool_choice": fields.tool_choice or "auto",
        "tools": fields.tools or [],
        "top_logprobs": fields.top_logprobs or 0,
        "top_p": job.params.top_p,
        "truncation": fields.truncation or "disabled",
        "usage": None,
        **({"user": fields.user} if fields.user is not None else {}),  # the one that may not be null
    }  # fmt: skip
