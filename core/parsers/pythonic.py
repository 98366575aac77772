"""Llama 4, Llama 3.2, Gemma 3, LFM2 and others: a list of Python calls.

    [f(a=1, b="x"), g()]

It stands at the beginning of the answer, or between `<|python_start|>` and `<|python_end|>` (Llama 4), or
`<|tool_call_start|>` and `<|tool_call_end|>` (LFM2); between those it may be JSON. A list is a call once it is whole.
"""

from __future__ import annotations

from typing import Any

from core.parsers.calls import CallParser
from core.parsers.json_scan import MAX_DEPTH
from core.parsers.reader import Malformed, Markers, Steps
from core.parsers.shapes import CallShape
from core.parsers.values import written_json

MARKS = {"<|python_start|>": "<|python_end|>", "<|tool_call_start|>": "<|tool_call_end|>"}
WORDS: dict[str, Any] = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0", "\n": ""}
HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
NUMBER_LETTERS = frozenset("+-.0123456789eE_")
PythonCall = tuple[str, str]
"""A tool's name, and its arguments as JSON."""


class PythonicParser(CallParser):
    openings = tuple(MARKS)
    markup = (*MARKS, *MARKS.values())
    shape = CallShape(first="[", begin="", middle="(", end=")", arguments="python", between=", ", last="]")
    _closing = Markers(MARKS.values())

    def _run(self) -> Steps[None]:
        yield from self._calls("")
        yield from super()._run()

    def _calls(self, marker: str) -> Steps[bool]:
        calls = yield from self._attempt(self._list())
        for name, arguments in calls or ():
            self._emit_start(name)
            self._emit_arguments(arguments)
        if not marker or not (calls or (yield from self._json_calls(self._closing))):
            return bool(calls)
        yield from self._is_next(MARKS[marker])
        return True

    def _list(self) -> Steps[list[PythonCall]]:
        yield from self._skip_space()
        yield from self._literal("[")
        calls = [(yield from self._python_call())]
        while (yield from self._more("]")):
            calls.append((yield from self._python_call()))
        return calls

    # -- Python ------------------------------------------------------------------------------------------------------

    def _python_call(self) -> Steps[PythonCall]:
        """A call with keyword arguments, all of them literals."""
        yield from self._skip_space()
        name = self._known((yield from self._word()))
        yield from self._skip_space()
        yield from self._literal("(")
        arguments: dict[str, Any] = {}
        if (yield from self._skip_space()) == ")":
            self._at += 1
            return name, "{}"
        while True:
            yield from self._skip_space()
            key = yield from self._word()
            yield from self._skip_space()
            yield from self._literal("=")
            if not key or key in arguments:
                raise Malformed
            arguments[key] = yield from self._python_value(0)
            if not (yield from self._more(")")):
                break
        try:
            return name, written_json(arguments)
        except ValueError:  # a number beyond all bounds
            raise Malformed from None

    def _more(self, end: str) -> Steps[bool]:
        """Read a comma, and say whether anything comes behind it; or `end`."""
        letter = yield from self._skip_space()
        if letter == ",":
            self._at += 1
            letter = yield from self._skip_space()
            if letter != end:
                return True
        yield from self._literal(end)
        return False

    def _python_value(self, depth: int) -> Steps[Any]:
        letter = yield from self._skip_space()
        if depth > MAX_DEPTH:
            raise Malformed
        if letter in ("'", '"'):
            return (yield from self._python_string())
        if letter in ("[", "("):
            return (yield from self._python_list("]" if letter == "[" else ")", depth))
        if letter == "{":
            return (yield from self._python_dict(depth))
        if letter and letter in NUMBER_LETTERS:
            return (yield from self._python_number())
        word = yield from self._word()
        if word not in WORDS:
            raise Malformed
        return WORDS[word]

    def _python_list(self, end: str, depth: int) -> Steps[list[Any]]:
        self._at += 1
        values: list[Any] = []
        if (yield from self._skip_space()) == end:
            self._at += 1
            return values
        values.append((yield from self._python_value(depth + 1)))
        while (yield from self._more(end)):
            values.append((yield from self._python_value(depth + 1)))
        return values

    def _python_dict(self, depth: int) -> Steps[dict[str, Any]]:
        self._at += 1
        values: dict[str, Any] = {}
        if (yield from self._skip_space()) == "}":
            self._at += 1
            return values
        while True:
            if (yield from self._skip_space()) not in ("'", '"'):
                raise Malformed
            key = yield from self._python_string()
            yield from self._skip_space()
            yield from self._literal(":")
            values[key] = yield from self._python_value(depth + 1)
            if not (yield from self._more("}")):
                return values

    def _python_number(self) -> Steps[int | float]:
        digits = ""
        while (letter := (yield from self._peek())) and letter in NUMBER_LETTERS:
            digits += letter
            self._at += 1
        try:
            return float(digits) if set(digits) & set(".eE") else int(digits)
        except ValueError:
            raise Malformed from None

    def _python_string(self) -> Steps[str]:
        """A string in single, double or triple quotes."""
        quote = yield from self._peek()
        self._at += 1
        if (yield from self._peek()) == quote:
            self._at += 1
            if (yield from self._peek()) != quote:
                return ""
            self._at += 1
            quote *= 3
        pieces: list[str] = []
        run = 0  # quotes one after another
        while run < len(quote):
            letter = yield from self._next()
            run = run + 1 if letter == quote[0] else 0
            pieces.append((yield from self._escape()) if letter == "\\" else letter)
        return "".join(pieces[: len(pieces) - run])

    def _escape(self) -> Steps[str]:
        letter = yield from self._next()
        size = HEX_DIGITS.get(letter)
        if size is None:
            return ESCAPES.get(letter, letter if letter in ("\\", "'", '"') else f"\\{letter}")
        digits = ""
        for _ in range(size):
            digits += yield from self._next()
        try:
            character = chr(int(digits, 16))
            character.encode()
        except (ValueError, OverflowError):  # half of a surrogate pair is no text either
            raise Malformed from None
        return character
