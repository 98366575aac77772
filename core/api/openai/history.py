"""Calls and thoughts of earlier messages, as some families' templates want them."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from core.parsers.families import HARMONY, OutputFormat

SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")
SHORT_IDS = ("mistral", "mistral_named")


def fit_messages(messages: list[dict[str, Any]], output_format: OutputFormat) -> list[dict[str, Any]]:
    """The same conversation. Mistral's templates refuse ids that are not nine letters and digits; Kimi's show ids
    alone, which have to name the function; Harmony's call thoughts `thinking`, and take none beside text and calls."""
    if output_format.tool_parser in SHORT_IDS:
        return [_with_short_ids(message) for message in messages]
    if output_format.tool_parser == "kimi_k2":
        return _with_naming_ids(messages)
    if output_format.reasoning_parser == HARMONY:
        return [_with_thinking(message) for message in messages]
    return messages


def short_id(text: str) -> str:
    """An id of nine letters and digits, the same for the same text."""
    return text if SHORT_ID.fullmatch(text) else hashlib.sha256(text.encode()).hexdigest()[:9]


def _with_short_ids(message: dict[str, Any]) -> dict[str, Any]:
    changed = dict(message)
    if isinstance(message.get("tool_call_id"), str):
        changed["tool_call_id"] = short_id(message["tool_call_id"])
    if message.get("tool_calls"):
        changed["tool_calls"] = [
            {**call, "id": short_id(call["id"])} if isinstance(call.get("id"), str) else call
            for call in message["tool_calls"]
        ]
    return changed


def _with_naming_ids(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ids as Kimi writes them: the function's name, and the number of the call in the conversation."""
    named: dict[Any, str] = {}
    changed = []
    for message in messages:
        message = dict(message)
        if message.get("tool_calls"):
            calls = []
            for call in message["tool_calls"]:
                name = f"functions.{call['function']['name']}:{len(named)}"
                named[call.get("id")] = name
                calls.append({**call, "id": name})
            message["tool_calls"] = calls
        if message.get("tool_call_id") in named:
            message["tool_call_id"] = named[message["tool_call_id"]]
        changed.append(message)
    return changed


def _with_thinking(message: dict[str, Any]) -> dict[str, Any]:
    thoughts = message.get("reasoning_content")
    if not thoughts or (message.get("tool_calls") and message.get("content")):
        return message
    return {**message, "thinking": thoughts}
