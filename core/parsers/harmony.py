"""gpt-oss's Harmony: messages in channels, for thinking, for calls and for the reader.

    <|channel|>analysis<|message|>…<|end|>
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>
    <|start|>assistant<|channel|>final<|message|>…<|return|>

All of the markup are control tokens. `analysis` is reasoning; `final`, and `commentary` that names no tool, is text.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from core.parsers.calls import CallParser
from core.parsers.reader import Malformed, Markers, Steps
from core.parsers.shapes import CallShape

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
BETWEEN = "\n\n"
"""Stands between two messages of which a client sees one text."""
MAX_HEADER = 512
_TO = r"(?:\s*to=(?:functions\.)?(?P<{}>[\w.-]+))?"
_HEADER = re.compile(
    rf"(?:<\|start\|>\s*\w*)?{_TO.format('first')}(?:<\|channel\|>\s*(?P<channel>\w+))?{_TO.format('tool')}"
    r"(?:\s*<\|constrain\|>)?\s*\w*\s*<\|message\|>"
)


class HarmonyParser(CallParser):
    openings = (START, CHANNEL)
    markup = (START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS)
    shape = CallShape(
        begin=f"{CHANNEL}commentary to=functions.", middle=f" {CONSTRAIN}json{MESSAGE}", end=ENDS[1],
        between=f"{START}assistant",
    )  # fmt: skip
    _body_end = Markers((*ENDS, START, CHANNEL))
    _last: Callable[[str], None] | None = None  # where the message before went

    def _calls(self, marker: str) -> Steps[bool]:
        """A message, up to its end."""
        header = yield from self._attempt(self._header(marker))
        if header is None:
            return False
        tool = header["tool"] or header["first"]
        emit: Callable[[str], None] = self._emit_text
        if tool in self._tools:
            self._emit_start(tool)
            emit = self._emit_arguments
        elif header["channel"] == "analysis":
            emit = self._emit_reasoning
        if emit == self._last:
            emit(BETWEEN)
        self._last = emit if emit != self._emit_arguments else None
        marker = yield from self._pass_until(self._body_end, emit)
        if marker and marker not in ENDS:
            self._at -= len(marker)  # the next message begins without an end of this one
        return True

    def _header(self, marker: str) -> Steps[re.Match[str]]:
        header = marker + (yield from self._until(MESSAGE, MAX_HEADER)) + MESSAGE
        found = _HEADER.fullmatch(header)
        if found is None:
            raise Malformed
        return found
