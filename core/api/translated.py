"""What adapters for other APIs have in common. They put a request into the words of `/v1/chat/completions`, whose path
to the engine it then takes, and put the answer, in pieces, into their own."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import pydantic_core

from core.api.body import validated
from core.api.generation import Framing
from core.api.openai.effort import SWITCHES
from core.api.openai.schemas import ChatRequest
from core.errors import InvalidRequestError, UnsupportedParameterError
from core.parsers.events import Arguments, Reasoning, Text
from core.request import FinishReason

if TYPE_CHECKING:
    from core.api.openai.answers import AnswerDeltas
    from core.api.openai.chat import ChatJob
    from core.engine.submission import LoadedModel

Names = Sequence[tuple[str, str]]
"""Patterns of names of OpenAI's parameters, and what the client calls them."""


@contextmanager
def client_names(names: Names) -> Iterator[None]:
    """Errors within name parameters as the client does."""
    try:
        yield
    except InvalidRequestError as error:
        _rename(error, names)
        raise


def _rename(error: InvalidRequestError, names: Names) -> None:
    param = error.param or ""
    for pattern, replacement in names:
        renamed, count = re.subn(pattern, replacement, param)
        if count:
            error.message = error.message.replace(param, renamed)
            error.param = renamed
            return


def chat_request(body: dict[str, Any]) -> ChatRequest:
    """A chat request from what an adapter made of its own; what is null was not given."""
    return validated(ChatRequest, {name: value for name, value in body.items() if value is not None})


class NamedEvents(Framing):
    """Server-sent events that are named by their type, without a mark at the end."""

    done = ""

    def chunk(self, chunk: dict[str, Any]) -> str:
        return f"event: {chunk['type']}\n{super().chunk(chunk)}"


def thinking_kwargs(wanted: bool, model: LoadedModel, param: str) -> dict[str, Any]:
    """What tells the template to think, or not to; nothing where it makes no difference.

    Raises `UnsupportedParameterError` for a model that cannot be told not to.
    """
    switch = next((name for name in SWITCHES if name in model.tokenizer.template_variables), None)
    if switch is not None:
        return {"chat_template_kwargs": {switch: wanted}}
    if not wanted and model.output_format.reasoning_parser is not None:
        raise UnsupportedParameterError(
            f"{model.name} always thinks: its chat template has no switch for it.", param=param
        )
    return {}


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool begins; its arguments follow."""

    id: str
    name: str


Piece: TypeAlias = "Text | Reasoning | Call | Arguments"


class AnswerPieces:
    """The one answer to a request, piece by piece.

    White space between calls and thoughts is left out, as long as there is anything else: APIs whose answers are lists
    of blocks would have it as blocks of its own, and refuse those when they come back.
    """

    def __init__(self, answer: AnswerDeltas) -> None:
        self._answer = answer
        self._space = ""
        self._in_text = False
        self._empty = True

    @classmethod
    def of(cls, job: ChatJob, generation_id: str) -> AnswerPieces:
        assert job.reader is not None
        return cls(job.reader.begin(generation_id, 0))

    def feed(self, text: str) -> Iterator[Piece]:
        """What has become certain with this piece of text."""
        return self._settled(_pieces(self._answer.feed(text)))

    def finish(self) -> Iterator[Piece]:
        """The rest, once no more text comes."""
        yield from self._settled(_pieces(self._answer.finish()))
        if self._empty and self._space:
            yield Text(self._space)

    def finish_reason(self, reason: FinishReason | None) -> str | None:
        """Why it ended: as in a chat completion."""
        return self._answer.finish_reason(reason)

    def _settled(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            if isinstance(piece, Text):
                if not self._in_text:
                    piece = Text(self._space + piece.text)
                    self._space = piece.text if piece.text.isspace() else ""
                    if self._space:
                        continue
                self._in_text = True
            else:
                self._in_text, self._space = False, ""
            self._empty = False
            yield piece


def _pieces(deltas: Iterable[dict[str, Any]]) -> Iterator[Piece]:
    for delta in deltas:
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                yield Call(call["id"], call["function"]["name"])
            elif call["function"]["arguments"]:
                yield Arguments(call["function"]["arguments"])
        if "reasoning_content" in delta:
            yield Reasoning(delta["reasoning_content"])
        if "content" in delta:
            yield Text(delta["content"])


def arguments_object(text: str) -> dict[str, Any]:
    """Arguments of a call for APIs that have them as an object. Of what is cut off it is what can be read, and of what
    is no object it is empty."""
    try:
        value = pydantic_core.from_json(text or "{}", allow_partial="trailing-strings", allow_inf_nan=False)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def derived_id(prefix: str, *parts: object) -> str:
    """An id that is the same for the same parts."""
    return prefix + hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:32]


def hex_of(generation_id: str) -> str:
    """The random part of a generation's id."""
    return generation_id.rpartition("-")[2]


def choice_of(kind: str, name: Any) -> Any:
    """OpenAI's `tool_choice`, by Anthropic's or the Responses API's word for it."""
    return {"type": "function", "function": {"name": name}} if kind == "function" else kind
