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

from core.parsers.reader import MAX_NAME, Steps
from core.parsers.sections import SectionParser
from core.parsers.shapes import CallShape

FENCE = "```"


class DeepSeekV31Parser(SectionParser):
    """Reads both forms."""

    first, last = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    opening, separator, closing = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
    shape = CallShape(first=first, begin=opening, middle=separator, end=closing, last=last)

    def _named(self, head: str) -> Steps[str]:
        if head != "function" or (yield from self._peek()) == "{":
            return head
        name = (yield from self._until("\n", MAX_NAME)).strip()
        yield from self._skip_space()
        yield from self._literal(FENCE)
        if (yield from self._peek()) == "j":
            yield from self._literal("json")
        return name

    def _after_arguments(self) -> Steps[None]:
        yield from self._is_next(FENCE)


class DeepSeekV3Parser(DeepSeekV31Parser):
    """The same for models whose template writes the first form."""

    shape = CallShape(
        first=DeepSeekV31Parser.first,
        begin=f"{DeepSeekV31Parser.opening}function{DeepSeekV31Parser.separator}",
        middle=f"\n{FENCE}json\n",
        end=f"\n{FENCE}{DeepSeekV31Parser.closing}",
        between="\n",
        last=DeepSeekV31Parser.last,
    )
