"""One answer's parser, made of those of its model: thoughts first, then calls in what is left."""

from __future__ import annotations

from core.parsers.events import Event, OutputParser, Text, ToolSchemas
from core.parsers.families import HARMONY, OutputFormat, parser_class
from core.parsers.reasoning import TAGS, ThinkParser, begins_open


class AnswerParser:
    """Reads the thoughts of an answer, if the model thinks, and its calls, if there are tools."""

    def __init__(
        self, output_format: OutputFormat, tools: ToolSchemas, *, prompt_end: str = "", continued: str | None = None
    ) -> None:
        """`tools` empty: no call is looked for. `prompt_end` is where the prompt ends, its last few tokens as text;
        `continued` the message of the model that goes on, if one does."""
        self._thoughts: OutputParser | None = None
        self._calls: OutputParser | None = None
        tool_parser = output_format.tool_parser if tools else None
        reasoning_parser = output_format.reasoning_parser
        if HARMONY in (tool_parser, reasoning_parser):
            self._calls = parser_class(HARMONY)(tools, {*output_format.call_tokens, *output_format.thought_tokens})
            return
        if reasoning_parser is not None:
            tags = TAGS[reasoning_parser]
            is_open = begins_open(tags, prompt_end, continued)
            self._thoughts = ThinkParser(tags, is_open=is_open, hidden=output_format.thought_tokens)
        if tool_parser is not None:
            self._calls = parser_class(tool_parser)(tools, output_format.call_tokens)

    def feed(self, text: str) -> list[Event]:
        """What has become certain with this piece of text."""
        return self._read_calls(self._thoughts.feed(text) if self._thoughts is not None else [Text(text)])

    def finish(self) -> list[Event]:
        """The rest, once no more text comes."""
        events = self._read_calls(self._thoughts.finish()) if self._thoughts is not None else []
        return events + (self._calls.finish() if self._calls is not None else [])

    def _read_calls(self, events: list[Event]) -> list[Event]:
        if self._calls is None:
            return events
        found: list[Event] = []
        for event in events:
            found += self._calls.feed(event.text) if isinstance(event, Text) else [event]
        return found


def tokens_to_keep(output_format: OutputFormat, *, has_tools: bool) -> tuple[int, ...]:
    """Special tokens that such a parser has to see."""
    calls = output_format.call_tokens.values() if has_tools else ()
    return tuple({*calls, *output_format.thought_tokens.values()})
