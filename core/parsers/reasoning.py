"""Text in which a model thinks before it answers, told from the answer by the tags around it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from core.parsers.reader import Markers, Steps, StreamParser


@dataclass(frozen=True, slots=True)
class ThinkTags:
    """What stands in front of the thoughts and behind them."""

    open: str
    close: str


TAGS = {
    "think": ThinkTags("<think>", "</think>"),
    "mistral": ThinkTags("[THINK]", "[/THINK]"),
    "granite": ThinkTags("Here is my thought process:", "Here is my response:"),
    "seed_oss": ThinkTags("<seed:think>", "</seed:think>"),
    "kimi": ThinkTags("◁think▷", "◁/think▷"),
    "cohere": ThinkTags("<|START_THINKING|>", "<|END_THINKING|>"),
    "gemma4": ThinkTags("<|channel>thought\n", "<channel|>"),
}
"""By the names of their parsers. `think` is DeepSeek R1's, Qwen 3's, GLM 4.5's, Granite 3.3's and many others'."""


class ThinkParser(StreamParser):
    """Thoughts stand at the beginning of an answer alone; tags behind it are text. White space next to the tags is
    part of them."""

    def __init__(self, tags: ThinkTags, *, is_open: bool, hidden: Collection[str] = ()) -> None:
        """`is_open`: the prompt ends with the opening tag. `hidden` are texts that no reader may see."""
        self._tags = tags
        self._is_open = is_open
        self._markers = Markers(sorted(hidden))
        super().__init__()

    def _run(self) -> Steps[None]:
        opened = yield from self._is_next(self._tags.open)
        if opened or self._is_open:
            yield from self._skip_space()
            yield from self._pass_until(Markers((self._tags.close,)), _Trimmed(self._emit_reasoning).add)
            yield from self._skip_space()
            self._has_calls = True  # white space alone is no answer
        while (yield from self._pass_until(self._markers, self._emit_text)):
            pass


class _Trimmed:
    """Passes text on without white space at its end."""

    def __init__(self, emit: Callable[[str], None]) -> None:
        self._emit = emit
        self._held = ""

    def add(self, piece: str) -> None:
        text = self._held + piece
        stripped = text.rstrip()
        self._held = text[len(stripped) :]
        if stripped:
            self._emit(stripped)


def begins_open(tags: ThinkTags, prompt_end: str, continued: str | None) -> bool:
    """Whether an answer begins within thoughts: by where its prompt ends, or by the message that goes on."""
    if continued is None:
        return is_open_at_end(tags, prompt_end)
    return continued.rfind(tags.open) > continued.rfind(tags.close)


def is_open_at_end(tags: ThinkTags, text: str) -> bool:
    """Whether a prompt that ends with `text` ends within thoughts that have not begun."""
    return text.rstrip().endswith(tags.open.strip())
