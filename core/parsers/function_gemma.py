"""FunctionGemma and Gemma 4: calls between tags, with strings between quotes of their own.

    <start_function_call>call:f{a:1,b:<escape>x<escape>}<end_function_call>
    <|tool_call>call:f{a:1,b:<|"|>x<|"|>}<tool_call|>

A call is read once it is whole.
"""

from __future__ import annotations

import json
from typing import Any

from core.parsers.calls import CallParser
from core.parsers.json_scan import MAX_DEPTH
from core.parsers.reader import MAX_ATTEMPT, Malformed, Steps
from core.parsers.shapes import CallShape
from core.parsers.values import written_json

WORDS: dict[str, Any] = {"true": True, "false": False, "null": None, "None": None}
BARE_END = frozenset(",}]")
MAX_BARE = 1024
"""Characters of a value without quotes."""


class FunctionGemmaParser(CallParser):
    openings = ("<start_function_call>",)
    closing = "<end_function_call>"
    quote = "<escape>"
    markup = ("<start_function_call>", "<end_function_call>", "<escape>")
    shape = CallShape(
        begin="<start_function_call>call:", middle="{", end="}<end_function_call>", arguments="gemma",
        quote="<escape>",
    )  # fmt: skip

    def _calls(self, marker: str) -> Steps[bool]:
        call = yield from self._attempt(self._call())
        if call is None:
            return False
        self._emit_start(call[0])
        self._emit_arguments(call[1])
        yield from self._is_next(self.closing)
        return True

    def _call(self) -> Steps[tuple[str, str]]:
        yield from self._skip_space()
        yield from self._literal("call:")
        name = self._known((yield from self._word()))
        if (yield from self._skip_space()) != "{":
            raise Malformed
        try:
            return name, written_json((yield from self._object(0)))
        except ValueError:  # a number beyond all bounds
            raise Malformed from None

    def _value(self, depth: int) -> Steps[Any]:
        letter = yield from self._skip_space()
        if depth > MAX_DEPTH:
            raise Malformed
        if letter == "{":
            return (yield from self._object(depth + 1))
        if letter == "[":
            return (yield from self._items(depth + 1))
        if letter == self.quote[0]:
            yield from self._literal(self.quote)
            return (yield from self._until(self.quote, MAX_ATTEMPT))
        bare = ""
        while (letter := (yield from self._peek())) and letter not in BARE_END and len(bare) < MAX_BARE:
            bare += letter
            self._at += 1
        return _bare_value(bare.strip())

    def _object(self, depth: int) -> Steps[dict[str, Any]]:
        self._at += 1
        values: dict[str, Any] = {}
        while (letter := (yield from self._skip_space())) != "}":
            if letter == self.quote[0]:
                yield from self._literal(self.quote)
                key = yield from self._until(self.quote, MAX_ATTEMPT)
                yield from self._literal(":")
            else:
                key = (yield from self._until(":", 256)).strip()
            values[key] = yield from self._value(depth)
            yield from self._separator("}")
        self._at += 1
        return values

    def _items(self, depth: int) -> Steps[list[Any]]:
        self._at += 1
        values: list[Any] = []
        while (yield from self._skip_space()) != "]":
            values.append((yield from self._value(depth)))
            yield from self._separator("]")
        self._at += 1
        return values

    def _separator(self, end: str) -> Steps[None]:
        letter = yield from self._skip_space()
        if letter == ",":
            self._at += 1
        elif letter != end:
            raise Malformed


class Gemma4Parser(FunctionGemmaParser):
    openings = ("<|tool_call>",)
    closing = "<tool_call|>"
    quote = '<|"|>'
    markup = ("<|tool_call>", "<tool_call|>", '<|"|>')
    shape = CallShape(
        begin="<|tool_call>call:", middle="{", end="}<tool_call|>", arguments="gemma", quote='<|"|>',
    )  # fmt: skip


def _bare_value(text: str) -> Any:
    """A number or a word; any other text is a string without its quotes."""
    if text in WORDS:
        return WORDS[text]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        if not text:
            raise Malformed from None
        return text
