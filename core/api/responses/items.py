"""From items of the Responses API to the messages of a chat request."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

from core.api.translated import Names
from core.errors import InvalidRequestError, UnsupportedParameterError

NAMES: Names = (
    (r"^(tools\[\d+\])\.function\b\.?", r"\1."),
    (r"^tool_choice\.function\.name", "tool_choice.name"),
    (r"^tool_choice\.allowed_tools\b\.?", "tool_choice."),
    (r"^response_format(\.json_schema)?", "text.format"),
    (r"^reasoning_effort", "reasoning.effort"),
    (r"^(max_tokens|max_completion_tokens)", "max_output_tokens"),
    (r"^(prompt|messages)$", "input"),
)
PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}
TEXT_PARTS = ("input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text")

Item = dict[str, Any]


def read_items(given: str | list[Item], find: Callable[[str], Item | None]) -> list[Item]:
    """Input items, each with its type and an id. `find` gives an earlier item by its id. None is referred to twice: a
    short body would else make a conversation of any length.

    Raises:
        InvalidRequestError: an item that is malformed, or refers to one that is not kept.
        UnsupportedParameterError: an item of a type that this server does not read.
    """
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    items = []
    referred: set[str] = set()
    for index, item in enumerate(given):
        param = f"input[{index}]"
        kind = item.get("type", "message" if "role" in item else "item_reference")
        if kind == "item_reference":
            found = find(_string(item, "id", param))
            if item["id"] in referred:
                raise InvalidRequestError(f"{param}: {item['id'][:64]} is referred to twice.", param=f"{param}.id")
            referred.add(item["id"])
            if found is None:
                raise InvalidRequestError(f"{param}: no item {item['id'][:64]} is kept.", param=f"{param}.id")
            items.append(found)
            continue
        if kind not in PREFIXES:
            raise UnsupportedParameterError(
                f"{param}: this server reads items of type {', '.join(PREFIXES)} and item_reference, not "
                f"{str(kind)[:64]}.",
                param=f"{param}.type",
            )
        _check(kind, item, param)
        if isinstance(item.get("content"), str) and kind == "message":
            part = "output_text" if item["role"] == "assistant" else "input_text"
            item = {**item, "content": [{"type": part, "text": item["content"]}]}
        given_id = item.get("id")
        item_id = given_id if isinstance(given_id, str) and given_id else f"{PREFIXES[kind]}_{uuid.uuid4().hex}"
        items.append({**item, "type": kind, "id": item_id})
    return items


def _check(kind: str, item: Item, param: str) -> None:
    if kind == "message":
        if item.get("role") not in ("user", "assistant", "system", "developer"):
            raise InvalidRequestError(
                f"{param}.role must be user, assistant, system or developer.", param=f"{param}.role"
            )
        part_texts(item.get("content"), f"{param}.content")
    elif kind == "function_call":
        for name in ("call_id", "name", "arguments"):
            _string(item, name, param)
    elif kind == "function_call_output":
        _string(item, "call_id", param)
        part_texts(item.get("output"), f"{param}.output")
    else:
        for name in ("content", "summary"):
            part_texts(item.get(name) or [], f"{param}.{name}")


def _string(item: Item, name: str, param: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise InvalidRequestError(f"{param}.{name} must be a string.", param=f"{param}.{name}")
    return value


def part_texts(content: Any, param: str) -> list[str]:
    """The texts of a content: text, or a list of parts of text."""
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise InvalidRequestError(f"{param} must be text or a list of parts.", param=param)
    texts = []
    for index, part in enumerate(content):
        where = f"{param}[{index}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise InvalidRequestError(f"{where} must be an object with a type.", param=where)
        if kind not in TEXT_PARTS:
            raise UnsupportedParameterError(
                f"{where}: this server reads parts of text only, not {kind[:64]}.", param=where
            )
        texts.append(_string(part, "refusal" if kind == "refusal" else "text", where))
    return texts


def messages_of(items: list[Item], instructions: str | None) -> list[dict[str, Any]]:
    """The conversation. Thoughts, text and calls of one turn are one message, and so is what is said to the system at
    the beginning, since some templates take it there alone."""
    said = [instructions] if instructions else []
    rest = list(items)
    while rest and rest[0].get("role") in ("system", "developer"):
        said += part_texts(rest.pop(0)["content"], "input")
    first = [{"role": "system", "content": "\n\n".join(said)}] if said else []
    return [*first, *_turns(rest)]


def _turns(items: list[Item]) -> Iterator[dict[str, Any]]:
    turn: dict[str, Any] = {}
    for item in items:
        kind = item["type"]
        if kind == "reasoning":
            if turn.keys() & {"content", "tool_calls"}:
                yield _assistant(turn)
                turn = {}
            thoughts = part_texts(item.get("content") or item.get("summary") or [], "input")
            if thoughts:  # and not only what another service has encrypted
                turn["reasoning_content"] = turn.get("reasoning_content", "") + "\n".join(thoughts)
        elif kind == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            turn.setdefault("tool_calls", []).append({"id": item["call_id"], "type": "function", "function": function})
        elif kind == "message" and item["role"] == "assistant":
            if turn.keys() & {"content", "tool_calls"}:
                yield _assistant(turn)
                turn = {}
            turn["content"] = "\n".join(part_texts(item["content"], "input"))
        else:
            if turn:
                yield _assistant(turn)
                turn = {}
            if kind == "message":
                yield {"role": item["role"], "content": "\n".join(part_texts(item["content"], "input"))}
            else:
                output = "\n".join(part_texts(item["output"], "input"))
                yield {"role": "tool", "tool_call_id": item["call_id"], "content": output}
    if turn:
        yield _assistant(turn)


def _assistant(turn: dict[str, Any]) -> dict[str, Any]:
    content = turn.get("content", None if "tool_calls" in turn else "")
    return {"role": "assistant", **turn, "content": content}
