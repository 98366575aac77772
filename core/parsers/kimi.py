"""Kimi K2: calls between control words, each named by an id that counts them.

<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|>
<|tool_calls_section_end|>
"""

from __future__ import annotations

import re

from core.parsers.calls import CallParser
from core.parsers.reader import MAX_NAME, Malformed, Markers, Steps
from core.parsers.shapes import CallShape

FIRST, LAST = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
OPEN, ARGUMENTS, CLOSE = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
ID = re.compile(r"(?:functions\.)?(.+?)(?::[0-9]+)?")


class KimiK2Parser(CallParser):
    openings = (FIRST, OPEN)
    markup = (FIRST, LAST, OPEN, ARGUMENTS, CLOSE)
    shape = CallShape(first=FIRST, begin=f"{OPEN}functions.", middle=f":0{ARGUMENTS}", end=CLOSE, last=LAST)
    _closing = Markers((CLOSE, LAST))

    def _calls(self, marker: str) -> Steps[bool]:
        name = yield from self._attempt(self._head(is_open=marker == OPEN))
        if name is None:
            return False
        while name is not None:
            self._emit_start(name)
            yield from self._json_arguments(self._closing)
            yield from self._is_next(CLOSE)
            name = yield from self._attempt(self._head(is_open=False))
        yield from self._is_next(LAST)
        return True

    def _head(self, *, is_open: bool) -> Steps[str]:
        """A call up to its arguments."""
        yield from self._skip_space()
        if not is_open:
            yield from self._literal(OPEN)
        found = ID.fullmatch((yield from self._until(ARGUMENTS, MAX_NAME)).strip())
        if found is None:
            raise Malformed
        if (yield from self._skip_space()) != "{":
            yield from self._literal("{")
        return self._known(found[1])
