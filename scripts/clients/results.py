"""What came of the checks, and the table of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from clients.common import LENGTH, OK, SERVER, WIT

BROKEN = "broken"
"""The client or its checks ended before all was tried."""
OUTCOMES = (OK, WIT, LENGTH, SERVER, BROKEN)
FAULTS = frozenset({SERVER, BROKEN})


@dataclass(frozen=True)
class Line:
    """One check, as `clients.common.check` prints it."""

    check: str
    outcome: str
    detail: str = ""
    on: str = ""
    constrained: bool = False


@dataclass
class Tried:
    """A client with its checks. `date` is when it was tried."""

    client: str
    versions: str
    date: str
    lines: list[Line] = field(default_factory=list)

    @property
    def counts(self) -> Counter[str]:
        return Counter(line.outcome for line in self.lines)

    @property
    def good(self) -> bool:
        return bool(self.lines) and not self.counts.keys() & FAULTS

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Tried:
        values: dict[str, Any] = json.loads(text)
        return cls(**{**values, "lines": [Line(**line) for line in values["lines"]]})


def read_lines(printed: str, *, status: int | None, said: str = "") -> list[Line]:
    """What a client's checks printed. `status` is their exit status, None if they were stopped for taking too long;
    `said` is what went to standard error. Other lines are the client's own and are left out."""
    lines = []
    for text in printed.splitlines():
        try:
            values = json.loads(text)
            line = Line(**values)
        except (ValueError, TypeError):
            continue
        if line.outcome not in OUTCOMES:
            line = Line(line.check, BROKEN, f"unknown outcome {line.outcome!r}", line.on)
        elif line.constrained and line.outcome == WIT:  # a model has no choice there
            line = Line(line.check, SERVER, line.detail, line.on, constrained=True)
        lines.append(line)
    if status is None:
        lines.append(Line("the next check", BROKEN, "no answer in time"))
    elif status != 0 or not lines:
        end = " ".join(said.split())[-200:]
        lines.append(Line("the next check", BROKEN, f"ended with status {status}: {end}"))
    return lines


def table(tried: Sequence[Tried]) -> str:
    """Two tables in Markdown: the clients, and all checks."""
    rows = ["| client | version | date | " + " | ".join(OUTCOMES) + " |", "|---|---|---|" + "---|" * len(OUTCOMES)]
    for each in tried:
        counts = " | ".join(str(each.counts[outcome] or "") for outcome in OUTCOMES)
        rows.append(f"| {each.client} | {_cell(each.versions)} | {each.date} | {counts} |")
    rows += ["", "| client | check | model | | what came back |", "|---|---|---|---|---|"]
    for each in tried:
        for line in each.lines:
            model = f"{line.on}, constrained" if line.constrained else line.on
            shown = line.outcome if line.outcome == OK else f"**{line.outcome}**"
            rows.append(f"| {each.client} | {_cell(line.check)} | {model} | {shown} | {_cell(line.detail)} |")
    return "\n".join(rows) + "\n"


def _cell(text: str, most: int = 120) -> str:
    """Text that stays in its cell, and on its line."""
    text = " ".join(text.split())
    text = text if len(text) <= most else text[: most - 1] + "…"
    for mark in "\\|`<*_[]":
        text = text.replace(mark, "\\" + mark)
    return text
