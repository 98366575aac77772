"""Answers of nothing: what `VRM_BACKEND_ALLOW_STUB=1` gives where no model is, for trying clients without one.

The model is called `vramancer-stub` in every answer, whatever was asked for, and the text says what it is.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

from core.errors import ModelNotLoadedError

STUB_NAME = "vramancer-stub"
STUB_HEADER = "X-VRAMancer-Stub"
STUB_TEXT = "This is a stub of VRAMancer, not a language model: no model is loaded."


def stub_answer(route: str) -> dict[str, Any]:
    """A whole answer to a chat or a completion. Raises `ModelNotLoadedError` for other routes."""
    content: dict[str, Any] = {"text": STUB_TEXT}
    if _is_chat(route):
        content = {"message": {"role": "assistant", "content": STUB_TEXT, "refusal": None}}
    return {**_head(route, "chat.completion"), "choices": [_choice(content, "stop")], "usage": _usage()}


def stub_events(route: str) -> list[dict[str, Any]]:
    """The same as chunks."""
    content: dict[str, Any] = {"text": STUB_TEXT}
    end: dict[str, Any] = {"text": ""}
    if _is_chat(route):
        content, end = {"delta": {"role": "assistant", "content": STUB_TEXT}}, {"delta": {}}
    head = _head(route, "chat.completion.chunk")
    return [{**head, "choices": [_choice(content, None)]}, {**head, "choices": [_choice(end, "stop")]}]


def _is_chat(route: str) -> bool:
    if route not in ("chat/completions", "completions"):
        raise ModelNotLoadedError(f"No model is loaded, and the stub does not answer /v1/{route}.")
    return route == "chat/completions"


def _head(route: str, kind: str) -> dict[str, Any]:
    kind = kind if _is_chat(route) else "text_completion"
    return {"id": f"stub-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": STUB_NAME}


def _choice(content: dict[str, Any], reason: str | None) -> dict[str, Any]:
    return {"index": 0, **content, "logprobs": None, "finish_reason": reason}


def _usage() -> dict[str, int]:
    return {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
