"""What parsers of tool calls share: text up to an opening, then calls; and calls that are JSON objects."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from core.parsers.events import ToolSchemas
from core.parsers.json_scan import JsonScanner
from core.parsers.reader import MAX_NAME, Malformed, Markers, Steps, StreamParser
from core.parsers.shapes import CallShape
from core.parsers.values import written_json

NAME_KEYS = ("name",)
ARGUMENTS_KEYS = ("arguments", "parameters")
FIRST_KEYS = frozenset({*NAME_KEYS, *ARGUMENTS_KEYS, "type", "id", "function"})
"""With one of these an object begins that may be a call."""


class CallParser(StreamParser):
    """Looks for calls of `tools` behind one of the `openings`; what is none is text.

    `hidden` are texts that no reader may see: control tokens that were kept for this parser alone.
    """

    openings: ClassVar[tuple[str, ...]]
    markup: ClassVar[tuple[str, ...]] = ()
    """All markup of the family that may be control tokens of a tokenizer."""
    short_ids: ClassVar[bool] = False
    """Its template takes ids of nine letters and digits, and no others."""
    shape: ClassVar[CallShape]

    def __init__(self, tools: ToolSchemas, hidden: Collection[str] = ()) -> None:
        self._tools = tools
        self._hidden = frozenset(hidden)
        self._markers = Markers((*self.openings, *sorted(self._hidden)))
        super().__init__()

    def _run(self) -> Steps[None]:
        while True:
            marker = yield from self._pass_until(self._markers, self._emit_text)
            if not marker:
                return
            if marker in self.openings and (yield from self._calls(marker)):
                continue
            if marker not in self._hidden:
                self._emit_text(marker)

    def _calls(self, marker: str) -> Steps[bool]:
        """Read what follows an opening. False: it is no call, and nothing of it has been read."""
        raise NotImplementedError

    def _known(self, name: str) -> str:
        """The name of a tool that may be called; a call of any other is none."""
        if name not in self._tools:
            raise Malformed
        return name

    # -- calls as JSON -----------------------------------------------------------------------------------------------

    def _json_calls(self, closing: Markers) -> Steps[bool]:
        """A call, several, or a list of calls. `closing` is where arguments end that are no JSON. False: the first is
        no call, and nothing has been read."""
        listed = yield from self._attempt(self._list_head())
        if not (yield from self._json_call(closing)):
            return False
        while (yield from self._attempt(self._another())):
            yield from self._json_call(closing)
        if listed:
            yield from self._is_next("]")
        return True

    def _list_head(self) -> Steps[bool]:
        """The beginning of a list whose first item is a call, which is read later."""
        yield from self._skip_space()
        yield from self._literal("[")
        return (yield from self._before_call())

    def _another(self) -> Steps[bool]:
        """What stands in front of a further call, which is read later."""
        if (yield from self._skip_space()) in (",", ";"):
            self._at += 1
        return (yield from self._before_call())

    def _before_call(self) -> Steps[bool]:
        before = self._place()
        try:
            yield from self._json_head()
        except Malformed:
            self._return_to(before)
            yield from self._whole_call()
        self._return_to(before)
        return True

    def _json_call(self, closing: Markers) -> Steps[bool]:
        """One object with a name and arguments, which are passed on as they come if the name is in front of them."""
        name = yield from self._attempt(self._json_head())
        if name is not None:
            self._emit_start(name)
            if (yield from self._json_arguments(closing)):
                yield from self._attempt(self._rest_of_object())
            return True
        call = yield from self._attempt(self._whole_call())
        if call is None:
            return False
        self._emit_start(call[0])
        self._emit_arguments(call[1])
        return True

    def _json_head(self) -> Steps[str]:
        """An object up to its arguments. Returns the name."""
        yield from self._skip_space()
        yield from self._literal("{")
        if (yield from self._key()) not in NAME_KEYS:
            raise Malformed
        name = self._known((yield from self._string()))
        yield from self._skip_space()
        yield from self._literal(",")
        if (yield from self._key()) not in ARGUMENTS_KEYS or (yield from self._skip_space()) != "{":
            raise Malformed
        return name

    def _json_arguments(self, closing: Markers) -> Steps[bool]:
        """An object, passed on as it comes. False: it is no JSON; then all up to `closing` is passed on, for the client
        to see what the model wrote."""
        scanner = JsonScanner()
        while not (scanner.done or scanner.broken):
            if not (yield from self._peek()):
                return False
            self._emit_arguments((yield from self._scan(scanner)))
        if scanner.broken:
            marker = yield from self._pass_until(closing, self._emit_arguments)
            self._at -= len(marker)
        return scanner.done

    def _rest_of_object(self) -> Steps[bool]:
        """What an object has behind its arguments."""
        scanner = JsonScanner(inside_object=True)
        while not scanner.done:
            if not (yield from self._peek()):
                raise Malformed
            yield from self._scan(scanner)
            if scanner.broken:
                raise Malformed
        return True

    def _whole_call(self) -> Steps[tuple[str, str]]:
        """A call whose parts come in another order, read to its end: name and arguments."""
        yield from self._skip_space()
        begin = self._place()
        yield from self._literal("{")
        if (yield from self._key()) not in FIRST_KEYS:
            raise Malformed
        self._return_to(begin)
        scanner = JsonScanner()
        pieces: list[str] = []
        while not scanner.done:
            if not (yield from self._peek()):
                raise Malformed
            pieces.append((yield from self._scan(scanner)))
            if scanner.broken:
                raise Malformed
        try:
            value = json.loads("".join(pieces))
            return self._call_of(value)
        except (ValueError, RecursionError):  # numbers too large for Python
            raise Malformed from None

    def _call_of(self, value: Mapping[str, Any]) -> tuple[str, str]:
        inner = value.get("function")
        if isinstance(inner, dict):
            value = inner
        name = value.get("name", inner)
        arguments = next((value[key] for key in ARGUMENTS_KEYS if key in value), None)
        if isinstance(arguments, str):
            arguments = json.loads(arguments or "{}")
        if not isinstance(name, str):
            raise Malformed
        if arguments is None and value.keys() <= FIRST_KEYS and not self._tools[self._known(name)].get("properties"):
            arguments = {}  # of a tool without parameters
        if not isinstance(arguments, dict):
            raise Malformed
        return self._known(name), written_json(arguments)

    def _key(self) -> Steps[str]:
        """A key and its colon."""
        key = yield from self._string()
        yield from self._skip_space()
        yield from self._literal(":")
        return key

    def _string(self) -> Steps[str]:
        """A short string without escapes, as names are."""
        yield from self._skip_space()
        yield from self._literal('"')
        text = yield from self._until('"', MAX_NAME)
        if "\\" in text:
            raise Malformed
        return text
