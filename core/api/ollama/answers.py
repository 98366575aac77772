"""Answers as Ollama has them: whole, and line by line."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

from core.api.body import to_json
from core.api.generation import Framing, Usage
from core.api.openai.chat import ChatJob, token_logprobs
from core.api.translated import AnswerPieces, Call, Piece, arguments_object
from core.errors import VRAMancerError
from core.parsers.events import Arguments, Reasoning, Text
from core.request import FinishReason, GenerationResult, RequestOutput, SequenceDelta

NS = 1_000_000_000


def error_body(error: VRAMancerError) -> dict[str, Any]:
    """An error in Ollama's shape."""
    return {"error": error.to_openai()["error"]["message"]}


class Lines(Framing):
    """A chunk a line (NDJSON). Nothing is sent while nothing comes: every line is an object to Ollama's clients."""

    mimetype = "application/x-ndjson"
    keep_alive = ""
    done = ""

    def chunk(self, chunk: dict[str, Any]) -> str:
        return to_json(chunk) + "\n"


class ChatLines(Lines):
    """The same with Ollama's errors."""

    def error(self, error: VRAMancerError) -> str:
        return self.chunk(error_body(error))


LINES = Lines()
CHAT_LINES = ChatLines()


def now_text() -> str:
    """As Ollama writes times: RFC 3339, in UTC."""
    return datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")


class Clock:
    """When a request came and its first token went, as the API saw them."""

    def __init__(self) -> None:
        self.started_s = time.perf_counter()
        self.first_s: float | None = None

    def note(self, output: RequestOutput) -> None:
        if self.first_s is None and any(delta.token_ids for delta in output.deltas):
            self.first_s = time.perf_counter()


def totals(clock: Clock, usage: Usage, reason: str | None) -> dict[str, Any]:
    """What Ollama says at the end. Times are nanoseconds; a loaded model takes none to load."""
    now_s = time.perf_counter()
    first_s = clock.first_s if clock.first_s is not None else now_s
    return {
        "done_reason": "length" if reason == "length" else "stop",
        "total_duration": int((now_s - clock.started_s) * NS),
        "load_duration": 0,
        "prompt_eval_count": usage.prompt_tokens,
        "prompt_eval_duration": int((first_s - clock.started_s) * NS),
        "eval_count": usage.completion_tokens,
        "eval_duration": int((now_s - first_s) * NS),
    }


class ChatWriter:
    """The answer of `/api/chat`: in lines, each with what the message gained, or as one."""

    def __init__(self, job: ChatJob, model_name: str, generation_id: str) -> None:
        self.clock = Clock()
        self._job = job
        self._name = model_name
        self._answer = AnswerPieces.of(job, generation_id)
        self._usage = Usage()
        self._call: Call | None = None
        self._arguments = ""
        self._num_calls = 0
        self._reason: FinishReason | None = None

    def whole(self, result: GenerationResult) -> dict[str, Any]:
        self._usage.add_result(result)
        completion = result.completions[0]
        message: dict[str, Any] = {"role": "assistant", "content": ""}
        for gained in self._gained(SequenceDelta(0, completion.text, finish_reason=completion.finish_reason)):
            for name in ("content", "thinking"):
                if gained.get(name):
                    message[name] = message.get(name, "") + gained[name]
            if "tool_calls" in gained:
                message.setdefault("tool_calls", []).extend(gained["tool_calls"])
        shown = self._logprobs(SequenceDelta(0, logprobs=tuple(completion.logprobs)))
        return {**self._line(message, done=True), **shown, **totals(self.clock, self._usage, self._reason)}

    def chunks(self, index: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        self.clock.note(output)
        self._usage.add_output(index, output)
        for delta in output.deltas:
            shown = self._logprobs(delta)
            for gained in self._gained(delta):
                yield {**self._line({"role": "assistant", "content": "", **gained}, done=False), **shown}
                shown = {}
            if shown:
                yield {**self._line({"role": "assistant", "content": ""}, done=False), **shown}

    def closing(self) -> Iterator[dict[str, Any]]:
        end = self._line({"role": "assistant", "content": ""}, done=True)
        yield {**end, **totals(self.clock, self._usage, self._reason)}

    def _gained(self, delta: SequenceDelta) -> Iterator[dict[str, Any]]:
        for piece in self._answer.feed(delta.text):
            yield from self._shown(piece)
        if delta.finish_reason is not None:
            self._reason = delta.finish_reason
            for piece in self._answer.finish():
                yield from self._shown(piece)
            yield from self._end_call()

    def _shown(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """A call is shown once it is whole."""
        if isinstance(piece, Arguments):
            self._arguments += piece.text
            return
        yield from self._end_call()
        if isinstance(piece, Call):
            self._call = piece
        elif isinstance(piece, Reasoning):
            yield {"thinking": piece.text}
        elif isinstance(piece, Text):
            yield {"content": piece.text}

    def _end_call(self) -> Iterator[dict[str, Any]]:
        if self._call is None:
            return
        function = {
            "index": self._num_calls, "name": self._call.name, "arguments": arguments_object(self._arguments),
        }  # fmt: skip
        yield {"tool_calls": [{"id": self._call.id, "function": function}]}
        self._call, self._arguments = None, ""
        self._num_calls += 1

    def _line(self, message: dict[str, Any], *, done: bool) -> dict[str, Any]:
        return {"model": self._name, "created_at": now_text(), "message": message, "done": done}

    def _logprobs(self, delta: SequenceDelta) -> dict[str, Any]:
        shown = token_logprobs(self._job.fields, self._job.model, delta.logprobs or ())
        return {"logprobs": shown["content"]} if shown is not None and shown["content"] else {}
