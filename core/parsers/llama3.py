"""Llama 3.x: an answer that is an object with a name and parameters.

    {"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}

It may come behind `<|python_tag|>`, which Llama 3.1 also writes in the middle of an answer. Without it, calls stand at
the beginning of the answer alone: JSON behind text is text.
"""

from __future__ import annotations

from core.parsers.calls import CallParser
from core.parsers.reader import Markers, Steps
from core.parsers.shapes import CallShape

TAG = "<|python_tag|>"
PYTHON_START, PYTHON_END = "<|python_start|>", "<|python_end|>"  # Llama 4's


class Llama3Parser(CallParser):
    openings = (TAG, PYTHON_START)
    markup = (TAG, PYTHON_START, PYTHON_END)
    shape = CallShape(begin='{"name": "', middle='", "parameters": ', end="}", between="; ")
    _closing = Markers((TAG, PYTHON_START, PYTHON_END))

    def _run(self) -> Steps[None]:
        if (yield from self._attempt(self._at_brace())):
            yield from self._calls("")
        yield from super()._run()

    def _at_brace(self) -> Steps[bool]:
        before = self._place()
        is_object = (yield from self._skip_space()) in ("{", "[")
        self._return_to(before)
        return is_object

    def _calls(self, marker: str) -> Steps[bool]:
        if not (yield from self._json_calls(self._closing)):
            return False
        yield from self._is_next(PYTHON_END)
        return True
