"""Gemma 2 and 3 where they are asked for Python: calls in a fenced block, mostly within `print`.

    ```tool_code
    print(f(a=1, b="x"))
    ```

The block is read once it is whole.
"""

from __future__ import annotations

from core.parsers.pythonic import PythonCall, PythonicParser
from core.parsers.reader import Malformed, Steps
from core.parsers.shapes import CallShape

OPEN, CLOSE = "```tool_code", "```"


class GemmaParser(PythonicParser):
    openings = (OPEN,)
    markup = ()
    shape = CallShape(
        first=f"{OPEN}\n", begin="", middle="(", end=")", arguments="python", between="\n", last=f"\n{CLOSE}",
    )  # fmt: skip

    def _calls(self, marker: str) -> Steps[bool]:
        calls = yield from self._attempt(self._block() if marker else self._list())
        for name, arguments in calls or ():
            self._emit_start(name)
            self._emit_arguments(arguments)
        return bool(calls)

    def _block(self) -> Steps[list[PythonCall]]:
        calls: list[PythonCall] = []
        while True:
            letter = yield from self._skip_space()
            if letter == "[":
                calls += yield from self._list()
            elif letter == "`" and calls:
                yield from self._literal(CLOSE)
                return calls
            else:
                calls.append((yield from self._line()))

    def _line(self) -> Steps[PythonCall]:
        before = self._place()
        if (yield from self._word()) == "print" and "print" not in self._tools:
            yield from self._skip_space()
            yield from self._literal("(")
            call = yield from self._python_call()
            yield from self._skip_space()
            yield from self._literal(")")
            return call
        self._return_to(before)
        if not (yield from self._peek()):
            raise Malformed
        return (yield from self._python_call())
