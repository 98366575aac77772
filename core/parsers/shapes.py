"""What a family's calls look like as text, for whoever has to make a model write one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class CallShape:
    """Calls are `first`, then one or several of `begin name middle arguments end`, with `between` them, then `last`.

    `arguments` says how those are written:
        json: one JSON object;
        tagged: each as `parameter_begin` with `{key}` (and `{is_text}`, true or false) filled in, its value, then
            `parameter_end`; strings as they are, other values as JSON;
        python: `key=value`, with commas, as Python literals;
        gemma: `key:value`, with commas; strings between two `quote`, all else like JSON without quotes around keys.
    """

    begin: str
    middle: str
    end: str
    arguments: Literal["json", "tagged", "python", "gemma"] = "json"
    first: str = ""
    between: str = ""
    last: str = ""
    parameter_begin: str = ""
    parameter_end: str = ""
    quote: str = ""
