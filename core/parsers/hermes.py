"""Hermes, Qwen 2.5, Qwen 3 and many others: `<tool_call>` around JSON.

    <tool_call>
    {"name": "f", "arguments": {"a": 1}}
    </tool_call>

The closing tag may be missing at the end, and there may be a list of calls between the tags.
"""

from __future__ import annotations

from core.parsers.calls import CallParser
from core.parsers.reader import Markers, Steps
from core.parsers.shapes import CallShape

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesParser(CallParser):
    openings = (OPEN,)
    markup = (OPEN, CLOSE)
    shape = CallShape(
        begin=f'{OPEN}\n{{"name": "', middle='", "arguments": ', end=f"}}\n{CLOSE}", between="\n",
    )  # fmt: skip
    _closing = Markers((CLOSE,))

    def _calls(self, marker: str) -> Steps[bool]:
        if not (yield from self._json_calls(self._closing)):
            return False
        # Small models write one brace too many, or leave one out.
        if not (yield from self._is_next(CLOSE)):
            yield from self._is_next("}", CLOSE)
        return True
