"""Granite 3: a list of calls behind `<|tool_call|>`.

    <|tool_call|>[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]

Phi-4-mini closes it with `<|/tool_call|>`. Granite 4 writes like Hermes.
"""

from __future__ import annotations

from core.parsers.calls import CallParser
from core.parsers.reader import Markers, Steps
from core.parsers.shapes import CallShape

OPEN, CLOSE = "<|tool_call|>", "<|/tool_call|>"


class GraniteParser(CallParser):
    openings = (OPEN,)
    markup = (OPEN, CLOSE)
    shape = CallShape(
        first=f"{OPEN}[", begin='{"name": "', middle='", "arguments": ', end="}", between=", ", last="]",
    )  # fmt: skip
    _closing = Markers((CLOSE, OPEN))

    def _calls(self, marker: str) -> Steps[bool]:
        if not (yield from self._json_calls(self._closing)):
            return False
        yield from self._is_next(CLOSE)
        return True
