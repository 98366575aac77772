"""What parsers find in a model's text, in the order in which it was written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

ToolSchemas: TypeAlias = "Mapping[str, Mapping[str, Any]]"
"""The JSON schema of the arguments of each tool that may be called, by the tool's name. An empty one takes anything."""


@dataclass(frozen=True, slots=True)
class Text:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text in which the model thinks, before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call of the tool `name` begins. Its arguments follow, up to the next start or to the end."""

    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A piece of the arguments of the call that began last: JSON, once all pieces are joined. It is what the model
    wrote where that is JSON; a model that was cut off, or wrote none, leaves it incomplete."""

    text: str


Event: TypeAlias = "Text | Reasoning | CallStart | Arguments"


class OutputParser(Protocol):
    """Reads the text of one answer. Never raises, and loses nothing but markup: what is no call is text. However the
    text is cut into pieces, the events are the same once `merged`."""

    def feed(self, text: str) -> list[Event]:
        """What has become certain with this piece of text."""

    def finish(self) -> list[Event]:
        """The rest, once no more text comes. Called once."""


ToolParser: TypeAlias = OutputParser
"""An `OutputParser` that looks for calls."""


def merged(events: Iterable[Event]) -> list[Event]:
    """The same with neighbours of one kind joined, and without empty pieces."""
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, CallStart):
            joined.append(event)
        elif last is not None and type(last) is type(event):
            joined[-1] = type(event)(last.text + event.text)
        elif event.text:
            joined.append(event)
    return joined
