"""Pieces of an answer as items of a response, with an event for each change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from core.api.responses.items import PREFIXES
from core.api.translated import Call, Piece
from core.parsers.events import Arguments, Reasoning, Text


class OutputItems:
    """`items` are those that have ended; the one that has not is shown in its events alone. Ids are made from `source`,
    so that an answer always has the same."""

    def __init__(self, source: str) -> None:
        self.items: list[dict[str, Any]] = []
        self.thoughts = ""
        self._source = source
        self._item: dict[str, Any] | None = None
        self._text = ""
        self._logprobs: list[Any] = []
        self._pending: list[Any] = []

    def add_logprobs(self, logprobs: list[Any]) -> None:
        """Of tokens whose text comes next. Those of thoughts and calls are not shown."""
        self._pending += logprobs

    def add(self, piece: Piece) -> Iterator[dict[str, Any]]:
        if isinstance(piece, Call):
            call = {"arguments": "", "call_id": piece.id, "name": piece.name}
            yield from self._begin("function_call", call)
        elif isinstance(piece, Reasoning):
            if self._kind != "reasoning":
                yield from self._begin("reasoning", {"summary": [], "content": []})
                yield self._part("added", self._content(""))
            self.thoughts += piece.text
            self._text += piece.text
            yield self._event("response.reasoning_text.delta", content_index=0, delta=piece.text)
        elif isinstance(piece, Arguments):
            self._text += piece.text
            yield self._event("response.function_call_arguments.delta", delta=piece.text)
        elif isinstance(piece, Text):
            if self._kind != "message":
                kept, self._pending = self._pending, []
                yield from self._begin("message", {"role": "assistant", "content": []})
                yield self._part("added", self._content(""))
                self._pending = kept
            shown, self._pending = _last_bytes(self._pending, len(piece.text.encode())), []
            self._logprobs += shown
            self._text += piece.text
            yield self._event("response.output_text.delta", content_index=0, delta=piece.text, logprobs=shown)
        if not isinstance(piece, Text):
            self._pending = []

    def close(self, *, cut: bool = False) -> Iterator[dict[str, Any]]:
        """End the item that is open, if one is; `cut`: the answer was cut off in it."""
        if self._item is None:
            return
        kind, content = self._kind, self._content(self._text)
        if kind == "function_call":
            yield self._event("response.function_call_arguments.done", name=self._item["name"], arguments=self._text)
            self._item["arguments"] = self._text
        else:
            if kind == "reasoning":
                yield self._event("response.reasoning_text.done", content_index=0, text=self._text)
            else:
                logprobs = {"logprobs": self._logprobs}
                yield self._event("response.output_text.done", content_index=0, text=self._text, **logprobs)
            yield self._part("done", content)
            self._item["content"] = [content]
        item = {**self._item, "status": "incomplete" if cut else "completed"}
        yield {"type": "response.output_item.done", "output_index": len(self.items), "item": item}
        self.items.append(item)
        self._item, self._text, self._logprobs = None, "", []

    @property
    def _kind(self) -> str | None:
        return self._item["type"] if self._item is not None else None

    def _begin(self, kind: str, values: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self.close()
        item_id = f"{PREFIXES[kind]}_{self._source}{len(self.items):x}"
        self._item = {"id": item_id, "type": kind, "status": "in_progress", **values}
        yield {"type": "response.output_item.added", "output_index": len(self.items), "item": dict(self._item)}

    def _content(self, text: str) -> dict[str, Any]:
        if self._kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(self._logprobs)}

    def _part(self, what: str, part: dict[str, Any]) -> dict[str, Any]:
        return self._event(f"response.content_part.{what}", content_index=0, part=part)

    def _event(self, kind: str, **values: Any) -> dict[str, Any]:
        assert self._item is not None
        return {"type": kind, "item_id": self._item["id"], "output_index": len(self.items), **values}


def _last_bytes(entries: list[Any], count: int) -> list[Any]:
    """The last tokens, as many as have so many bytes: markup before them is no part of the text."""
    first = len(entries)
    while first and count > 0:
        first -= 1
        count -= len(entries[first]["bytes"])
    return entries[first:]
