"""DeepSeek V3.2: tags that name functions and parameters, and say which values are strings.

<｜DSML｜function_calls>
<｜DSML｜invoke name="f">
<｜DSML｜parameter name="a" string="false">1</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜function_calls>
"""

from __future__ import annotations

from typing import ClassVar

from core.parsers.reader import MAX_NAME, Malformed, Steps
from core.parsers.shapes import CallShape
from core.parsers.tagged import MAX_KEY, TaggedParser

WORD = "｜DSML｜"
FIRST, LAST = f"<{WORD}function_calls>", f"</{WORD}function_calls>"
INVOKE, INVOKE_END = f'<{WORD}invoke name="', f"</{WORD}invoke>"
PARAMETER, PARAMETER_END = f'<{WORD}parameter name="', f"</{WORD}parameter>"

IS_TEXT = {'string="true"': True, 'string="false"': False, "": None}


class InvokeParser(TaggedParser):
    """Calls between such tags, which subclasses name."""

    last: ClassVar[str]
    invoke: ClassVar[str]
    invoke_end: ClassVar[str]
    parameter: ClassVar[str]

    def _calls(self, marker: str) -> Steps[bool]:
        name = yield from self._attempt(self._head())
        if name is None:
            return False
        while name is not None:
            self._emit_start(name)
            if not (yield from self._arguments(name, self.invoke_end)):
                return True
            name = yield from self._attempt(self._head())
        yield from self._is_next(self.last)
        return True

    def _head(self) -> Steps[str]:
        yield from self._skip_space()
        yield from self._literal(self.invoke)
        name = self._known((yield from self._until('"', MAX_NAME)))
        yield from self._literal(">")
        return name

    def _parameter_head(self) -> Steps[tuple[str, bool | None]]:
        yield from self._skip_space()
        yield from self._literal(self.parameter)
        key = yield from self._until('"', MAX_KEY)
        rest = (yield from self._until(">", 32)).strip()
        if rest not in IS_TEXT:
            raise Malformed
        return key, IS_TEXT[rest]


class DeepSeekV32Parser(InvokeParser):
    openings = (FIRST,)
    markup = (WORD,)
    last = LAST
    invoke, invoke_end = INVOKE, INVOKE_END
    parameter, value_end = PARAMETER, PARAMETER_END
    shape = CallShape(
        first=f"{FIRST}\n", begin=INVOKE, middle='">\n', end=INVOKE_END, arguments="tagged", between="\n",
        last=f"\n{LAST}", parameter_begin=f'{PARAMETER}{{key}}" string="{{is_text}}">',
        parameter_end=f"{PARAMETER_END}\n",
    )  # fmt: skip
