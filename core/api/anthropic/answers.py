"""Answers as Anthropic's messages, whole and as the events of a stream.

Events come in this order: `message_start`, `ping`; for each block `content_block_start`, its deltas and
`content_block_stop`; `message_delta` with the reason and what was used; `message_stop`. A stream that fails ends with
`error`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from core.api.anthropic.schemas import MessagesRequest
from core.api.body import to_json
from core.api.generation import Usage
from core.api.openai.chat import ChatJob
from core.api.translated import AnswerPieces, Call, NamedEvents, Piece, arguments_object, derived_id, hex_of
from core.errors import VRAMancerError
from core.parsers.events import Arguments, Reasoning, Text
from core.request import GenerationResult, RequestOutput, SequenceDelta

PING = {"type": "ping"}
ERROR_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    408: "timeout_error", 413: "request_too_large", 415: "invalid_request_error", 429: "rate_limit_error",
    503: "overloaded_error",
}  # fmt: skip


def error_body(error: VRAMancerError) -> dict[str, Any]:
    """An error in Anthropic's shape; `param` and `code` are ours."""
    shown = error.to_openai()["error"]
    kind = ERROR_TYPES.get(error.status) or ("api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, **{key: shown[key] for key in ("message", "param", "code")}}}


class MessageEvents(NamedEvents):
    """Anthropic's."""

    keep_alive = f"event: ping\ndata: {to_json(PING)}\n\n"

    def error(self, error: VRAMancerError) -> str:
        return self.chunk(error_body(error))


EVENTS = MessageEvents()


class MessageWriter:
    """One message: its events as they come, or all of it. `capped`: fewer tokens fitted than were allowed."""

    def __init__(self, fields: MessagesRequest, job: ChatJob, generation_id: str, *, capped: bool) -> None:
        self._fields = fields
        self._job = job
        self._capped = capped
        self._id = "msg_" + hex_of(generation_id)
        self._answer = AnswerPieces.of(job, generation_id)
        self._usage = Usage()
        self._blocks = Blocks(self._id, omit_thoughts=bool(fields.thinking and fields.thinking.display == "omitted"))
        self._started = False
        self._stop: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}

    def message(self, result: GenerationResult) -> dict[str, Any]:
        """The whole message."""
        self._usage.add_result(result)
        completion = result.completions[0]
        text = SequenceDelta(
            0, completion.text, finish_reason=completion.finish_reason, stop_reason=completion.stop_reason
        )
        for _ in self._events(text):
            pass
        for _ in self._blocks.close():
            pass
        content = [{**block, "input": arguments_object(block["input"])} if "input" in block else block
                   for block in self._blocks.blocks]  # fmt: skip
        return {**self._head(), "content": content, **self._stop, "usage": self._used()}

    def chunks(self, index: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        self._usage.add_output(index, output)
        if not self._started:
            self._started = True
            used = {**self._used(), "output_tokens": 0}
            yield {"type": "message_start", "message": {**self._head(), "content": [], **self._stop, "usage": used}}
            yield PING
        for delta in output.deltas:
            yield from self._events(delta)

    def closing(self) -> Iterator[dict[str, Any]]:
        yield from self._blocks.close()
        yield {"type": "message_delta", "delta": self._stop, "usage": self._used()}
        yield {"type": "message_stop"}

    def _events(self, delta: SequenceDelta) -> Iterator[dict[str, Any]]:
        for piece in self._answer.feed(delta.text):
            yield from self._blocks.add(piece)
        if delta.finish_reason is not None:
            for piece in self._answer.finish():
                yield from self._blocks.add(piece)
            self._stop = self._stopped(delta)

    def _stopped(self, delta: SequenceDelta) -> dict[str, Any]:
        reason = self._answer.finish_reason(delta.finish_reason)
        sequence = delta.stop_reason if isinstance(delta.stop_reason, str) else None
        if reason == "length":
            reason = "model_context_window_exceeded" if self._capped else "max_tokens"
        elif reason == "tool_calls":
            reason = "tool_use"
        else:
            reason = "stop_sequence" if sequence is not None else "end_turn"
        return {"stop_reason": reason, "stop_sequence": sequence}

    def _head(self) -> dict[str, Any]:
        return {"id": self._id, "type": "message", "role": "assistant", "model": self._fields.model}

    def _used(self) -> dict[str, Any]:
        """Tokens; those that were found in the prefix cache are not part of `input_tokens`."""
        return {
            "input_tokens": self._usage.prompt_tokens - self._usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self._usage.cached_tokens,
            "output_tokens": self._usage.completion_tokens,
        }


class Blocks:
    """Pieces of an answer as the blocks of a message, with an event for each change. `input` of a call is its text."""

    def __init__(self, message_id: str, *, omit_thoughts: bool) -> None:
        self.blocks: list[dict[str, Any]] = []
        self._message_id = message_id
        self._omit_thoughts = omit_thoughts
        self._thoughts = ""
        self._open = False

    def add(self, piece: Piece) -> Iterator[dict[str, Any]]:
        if isinstance(piece, Call):
            call_id = derived_id("toolu_", self._message_id, piece.id)
            yield from self._begin({"type": "tool_use", "id": call_id, "name": piece.name, "input": ""})
        elif isinstance(piece, Arguments):
            self.blocks[-1]["input"] += piece.text
            yield self._delta({"type": "input_json_delta", "partial_json": piece.text})
        elif isinstance(piece, Reasoning):
            if not self._is_open("thinking"):
                yield from self._begin({"type": "thinking", "thinking": "", "signature": ""})
            self._thoughts += piece.text
            if not self._omit_thoughts:
                self.blocks[-1]["thinking"] += piece.text
                yield self._delta({"type": "thinking_delta", "thinking": piece.text})
        elif isinstance(piece, Text):
            if not self._is_open("text"):
                yield from self._begin({"type": "text", "text": ""})
            self.blocks[-1]["text"] += piece.text
            yield self._delta({"type": "text_delta", "text": piece.text})

    def close(self) -> Iterator[dict[str, Any]]:
        """End the block that is open, if one is. Thoughts are signed with their digest: clients send them back as they
        are, and this server checks nothing."""
        if not self._open:
            return
        if self._is_open("thinking"):
            signature = hashlib.sha256(self._thoughts.encode()).hexdigest()
            self.blocks[-1]["signature"] = signature
            yield self._delta({"type": "signature_delta", "signature": signature})
        self._open = False
        yield {"type": "content_block_stop", "index": len(self.blocks) - 1}

    def _begin(self, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self.close()
        self._thoughts = ""
        self.blocks.append(block)
        self._open = True
        shown = {**block, "input": {}} if "input" in block else dict(block)
        yield {"type": "content_block_start", "index": len(self.blocks) - 1, "content_block": shown}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self.blocks) - 1, "delta": delta}

    def _is_open(self, kind: str) -> bool:
        return self._open and self.blocks[-1]["type"] == kind
