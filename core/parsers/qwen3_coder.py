"""Qwen3-Coder and others: functions and parameters in tags.

    <tool_call>
    <function=f>
    <parameter=a>
    1
    </parameter>
    </function>
    </tool_call>

The outer tags may be missing.
"""

from __future__ import annotations

from core.parsers.hermes import CLOSE, OPEN
from core.parsers.reader import MAX_NAME, Steps
from core.parsers.shapes import CallShape
from core.parsers.tagged import MAX_KEY, TaggedParser

FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"


class Qwen3CoderParser(TaggedParser):
    openings = (OPEN, FUNCTION)
    markup = (OPEN, CLOSE)
    value_end = PARAMETER_END
    pads_lines = True
    shape = CallShape(
        begin=f"{OPEN}\n{FUNCTION}", middle=">\n", end=f"{FUNCTION_END}\n{CLOSE}", arguments="tagged", between="\n",
        parameter_begin=f"{PARAMETER}{{key}}>\n", parameter_end=f"\n{PARAMETER_END}\n",
    )  # fmt: skip

    def _calls(self, marker: str) -> Steps[bool]:
        name = yield from self._attempt(self._head(is_open=marker == FUNCTION))
        if name is None:
            return False
        self._emit_start(name)
        if (yield from self._arguments(name, FUNCTION_END)):
            yield from self._is_next(CLOSE)
        return True

    def _head(self, *, is_open: bool) -> Steps[str]:
        if not is_open:
            yield from self._skip_space()
            yield from self._literal(FUNCTION)
        return self._known((yield from self._until(">", MAX_NAME)).strip())

    def _parameter_head(self) -> Steps[tuple[str, bool | None]]:
        yield from self._skip_space()
        yield from self._literal(PARAMETER)
        return (yield from self._until(">", MAX_KEY)).strip(), None
