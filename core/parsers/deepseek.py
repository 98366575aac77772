"""DeepSeek V3, R1 and V3.1: calls between control words with full-width bars.

V3 and R1:
    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f
    ```json
    {"a": 1}
    ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>
V3.1:
    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>
"""

from __future__ import annotations

from core.parsers.calls import CallParser
from core.parsers.reader import MAX_NAME, Markers, Steps
from core.parsers.shapes import CallShape

FIRST, LAST = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
OPEN, SEPARATOR, CLOSE = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
FENCE = "```"


class DeepSeekV31Parser(CallParser):
    """Reads both forms."""

    openings = (FIRST, OPEN)
    markup = (FIRST, LAST, OPEN, SEPARATOR, CLOSE)
    shape = CallShape(first=FIRST, begin=OPEN, middle=SEPARATOR, end=CLOSE, last=LAST)
    _closing = Markers((CLOSE, LAST))

    def _calls(self, marker: str) -> Steps[bool]:
        name = yield from self._attempt(self._head(is_open=marker == OPEN))
        if name is None:
            return False
        while name is not None:
            self._emit_start(name)
            yield from self._json_arguments(self._closing)
            yield from self._is_next(FENCE)
            yield from self._is_next(CLOSE)
            name = yield from self._attempt(self._head(is_open=False))
        yield from self._is_next(LAST)
        return True

    def _head(self, *, is_open: bool) -> Steps[str]:
        """A call up to its arguments."""
        yield from self._skip_space()
        if not is_open:
            yield from self._literal(OPEN)
        name = (yield from self._until(SEPARATOR, MAX_NAME)).strip()
        if name == "function" and (yield from self._peek()) != "{":
            name = (yield from self._until("\n", MAX_NAME)).strip()
            yield from self._skip_space()
            yield from self._literal(FENCE)
            if (yield from self._peek()) == "j":
                yield from self._literal("json")
        if (yield from self._skip_space()) != "{":
            yield from self._literal("{")
        return self._known(name)


class DeepSeekV3Parser(DeepSeekV31Parser):
    """The same for models whose template writes the first form."""

    shape = CallShape(
        first=FIRST, begin=f"{OPEN}function{SEPARATOR}", middle=f"\n{FENCE}json\n", end=f"\n{FENCE}{CLOSE}",
        between="\n", last=LAST,
    )  # fmt: skip
