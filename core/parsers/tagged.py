"""What families share that write each argument between tags, as it is: strings without quotes, all else as JSON."""

from __future__ import annotations

import json

from core.parsers.calls import CallParser
from core.parsers.reader import Markers, Steps
from core.parsers.values import to_json, types_of

MAX_KEY = 256


class TaggedParser(CallParser):
    """Subclasses read a call's head, the tags around an argument, and the end of a call."""

    value_end: str
    """The tag behind a value."""
    pads_lines = False
    """A line break belongs to the tag in front of a value and to that behind it."""

    def _parameter_head(self) -> Steps[tuple[str, bool | None]]:
        """Up to a value: its key, and whether it is a string, if the model says so."""
        raise NotImplementedError

    def _arguments(self, name: str, *end: str) -> Steps[bool]:
        """All arguments of a call and the tags `end` behind them. False: what comes instead is text."""
        schema = self._tools[name]
        closing = Markers((self.value_end,))
        opening = "{"
        while True:
            if (yield from self._is_next(*end)):
                self._emit_arguments("}" if opening != "{" else "{}")
                return True
            head = yield from self._attempt(self._parameter_head())
            if head is None:
                # Without all of its arguments it must not look whole.
                cut_off = self._met_end
                self._emit_arguments(opening if opening == "{" else "")
                self._emit_arguments("" if cut_off else "}")
                return False
            key, is_text = head
            self._emit_arguments(f"{opening}{json.dumps(key, ensure_ascii=False)}: ")
            opening = ", "
            types = types_of(schema, key)
            if is_text is None:
                is_text = types == {"string"}
            if not (yield from self._value(closing, types, is_text=is_text)):
                return False

    def _value(self, closing: Markers, types: frozenset[str], *, is_text: bool) -> Steps[bool]:
        """A value and the tag behind it: strings are passed on as they come. False: the text ended in it."""
        padding = _Padding(active=self.pads_lines)
        if not is_text:
            pieces: list[str] = []
            found = yield from self._pass_until(closing, lambda piece: pieces.append(padding.strip(piece)))
            text = "".join(pieces)
            self._emit_arguments(to_json(text, types) if found else text + padding.held)
            return bool(found)
        self._emit_arguments('"')
        found = yield from self._pass_until(closing, lambda piece: self._emit_arguments(_escaped(padding.strip(piece))))
        self._emit_arguments('"' if found else _escaped(padding.held))
        return bool(found)


class _Padding:
    """Takes one line break from the beginning of a text in pieces, and one from its end."""

    def __init__(self, *, active: bool) -> None:
        self.held = ""
        self._active = active
        self._begun = not active

    def strip(self, piece: str) -> str:
        """What of the text is certain to stay."""
        if not self._begun and piece:
            self._begun = True
            piece = piece.removeprefix("\n")
        if not self._active:
            return piece
        piece = self.held + piece
        self.held = "\n" if piece.endswith("\n") else ""
        return piece.removesuffix("\n")


def _escaped(text: str) -> str:
    """As within a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
