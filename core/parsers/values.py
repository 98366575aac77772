"""Values that a model wrote as plain text, as the JSON that a tool's schema asks for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_TYPES = frozenset({"string", "number", "integer", "boolean", "array", "object", "null"})
_WORDS = {"True": "true", "False": "false", "None": "null"}
_MAX_REFERENCES = 16


def types_of(schema: Mapping[str, Any], key: str) -> frozenset[str]:
    """The types that the argument `key` may have; empty if the schema of the arguments does not say."""
    properties = schema.get("properties")
    found = properties.get(key) if isinstance(properties, dict) else None
    return _types(found, schema, _MAX_REFERENCES)


def _types(value: Any, root: Mapping[str, Any], depth: int) -> frozenset[str]:
    if not isinstance(value, dict) or depth == 0:
        return frozenset()
    reference = value.get("$ref")
    if isinstance(reference, str):
        return _types(_follow(reference, root), root, depth - 1)
    kind = value.get("type")
    if kind is not None:
        return frozenset(kind if isinstance(kind, list) else [kind]) & _TYPES
    for word in ("anyOf", "oneOf"):
        branches = value.get(word)
        if isinstance(branches, list):
            each = [_types(branch, root, depth - 1) for branch in branches]
            return frozenset().union(*each) if all(each) else frozenset()
    choices = value.get("enum", [value["const"]] if "const" in value else [])
    if choices and isinstance(choices, list):
        return frozenset(map(type_of, choices))
    return frozenset()


def type_of(value: Any) -> str:
    """The JSON type of a value."""
    if value is None:
        return "null"
    for kind, name in ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array")):
        if isinstance(value, kind):
            return name
    return "object"


def _follow(reference: str, root: Mapping[str, Any]) -> Any:
    """What a `#/…` reference points to."""
    found: Any = root
    for part in reference.removeprefix("#").split("/")[1:]:
        found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
    return found


def to_json(text: str, types: frozenset[str]) -> str:
    """The JSON of a value written as `text`: read as JSON if one of `types` is what that gives, or else a string.
    Without types, anything that is JSON is taken as such."""
    plain = text.strip()
    written = _WORDS.get(plain, plain)
    try:
        kind = type_of(json.loads(written, parse_constant=_refuse))
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    fits = not types or kind in types or (kind == "integer" and "number" in types)
    return written if fits or "string" not in types else json.dumps(text, ensure_ascii=False)


def written_json(value: Any) -> str:
    """A value as JSON. Raises ValueError for numbers that JSON does not have, and those too long for Python. Halves of
    surrogate pairs, which JSON's escapes can spell and no text can hold, stay escaped."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False)
    return text


def _refuse(word: str) -> Any:
    raise ValueError(word)
