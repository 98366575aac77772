"""Mistral: calls behind `[TOOL_CALLS]`, a control token, in one of two forms.

    [TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}]
    [TOOL_CALLS]f{"a": 1}[TOOL_CALLS]g{}

The second form may have `[CALL_ID]abcdefghi` behind the name and `[ARGS]` in front of the arguments.
"""

from __future__ import annotations

from core.parsers.calls import CallParser
from core.parsers.reader import Markers, Steps
from core.parsers.shapes import CallShape

OPEN, ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"


class MistralParser(CallParser):
    openings = (OPEN,)
    markup = (OPEN, ID, ARGS)
    short_ids = True
    shape = CallShape(
        first=f"{OPEN} [", begin='{"name": "', middle='", "arguments": ', end="}", between=", ", last="]",
    )  # fmt: skip
    _closing = Markers((OPEN,))

    def _calls(self, marker: str) -> Steps[bool]:
        name = yield from self._attempt(self._named())
        if name is None:
            return (yield from self._json_calls(self._closing))
        self._emit_start(name)
        yield from self._json_arguments(self._closing)
        return True

    def _named(self) -> Steps[str]:
        """The newer form up to its arguments."""
        yield from self._skip_space()
        name = self._known((yield from self._word()))
        if (yield from self._skip_space()) == "[":
            yield from self._literal("[")
            letter = yield from self._peek()
            yield from self._literal("CALL_ID]" if letter == "C" else "ARGS]")
            if letter == "C":
                yield from self._word()
                yield from self._literal(ARGS)
        if (yield from self._skip_space()) != "{":
            yield from self._literal("{")
        return name


class MistralNamedParser(MistralParser):
    """The same for models whose template writes the second form, with `[ARGS]`."""

    shape = CallShape(begin=OPEN, middle=ARGS, end="")
