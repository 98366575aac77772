"""GLM 4.5 and later: keys and values in tags.

    <tool_call>f
    <arg_key>a</arg_key>
    <arg_value>1</arg_value>
    </tool_call>

GLM 4.7 writes no line breaks.
"""

from __future__ import annotations

from core.parsers.hermes import CLOSE, OPEN
from core.parsers.reader import Malformed, Steps
from core.parsers.shapes import CallShape
from core.parsers.tagged import MAX_KEY, TaggedParser

KEY, KEY_END = "<arg_key>", "</arg_key>"
VALUE, VALUE_END = "<arg_value>", "</arg_value>"


class GlmParser(TaggedParser):
    openings = (OPEN,)
    markup = (OPEN, CLOSE, KEY, KEY_END, VALUE, VALUE_END)
    value_end = VALUE_END
    shape = CallShape(
        begin=OPEN, middle="\n", end=CLOSE, arguments="tagged", between="\n",
        parameter_begin=f"{KEY}{{key}}{KEY_END}\n{VALUE}", parameter_end=f"{VALUE_END}\n",
    )  # fmt: skip

    def _calls(self, marker: str) -> Steps[bool]:
        name = yield from self._attempt(self._head())
        if name is None:
            return False
        self._emit_start(name)
        yield from self._arguments(name, CLOSE)
        return True

    def _head(self) -> Steps[str]:
        yield from self._skip_space()
        name = self._known((yield from self._word()))
        if (yield from self._skip_space()) != "<":
            raise Malformed
        return name

    def _parameter_head(self) -> Steps[tuple[str, bool | None]]:
        yield from self._skip_space()
        yield from self._literal(KEY)
        key = (yield from self._until(KEY_END, MAX_KEY)).strip()
        yield from self._skip_space()
        yield from self._literal(VALUE)
        return key, None
