"""Kimi K2: calls between control words, each named by an id that counts them.

<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|>
<|tool_calls_section_end|>
"""

from __future__ import annotations

import re

from core.parsers.reader import Malformed, Steps
from core.parsers.sections import SectionParser
from core.parsers.shapes import CallShape

ID = re.compile(r"(?:functions\.)?(.+?)(?::[0-9]+)?")


class KimiK2Parser(SectionParser):
    first, last = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
    opening, separator, closing = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
    shape = CallShape(
        first=first, begin=f"{opening}functions.", middle=f":0{separator}", end=closing, last=last,
    )  # fmt: skip

    def _named(self, head: str) -> Steps[str]:
        yield from ()
        found = ID.fullmatch(head)
        if found is None:
            raise Malformed
        return found[1]
