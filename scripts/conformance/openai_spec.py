"""OpenAI's specification, cut to the routes that this server has, as JSON Schema 2020-12 has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PATHS: dict[str, tuple[str, ...]] = {
    "/chat/completions": ("post",),
    "/completions": ("post",),
    "/embeddings": ("post",),
    "/models": ("get",),
    "/models/{model}": ("get",),
    "/responses": ("post",),
    "/responses/{response_id}": ("get", "delete"),
    "/responses/{response_id}/cancel": ("post",),
    "/responses/{response_id}/input_items": ("get",),
}
"""Kept completions (`GET /chat/completions`), compaction and deleting a model are no routes of this server."""
EVENTS = {
    "/chat/completions": "CreateChatCompletionStreamResponse",
    "/completions": "CreateCompletionResponse",
    "/responses": "ResponseStreamEvent",
}
"""What each event of a stream is."""


def read_spec(path: Path) -> dict[str, Any]:
    """The document, with the paths above alone."""
    found = json.loads(path.read_text(encoding="utf-8"))
    components = {name: value for name, value in found["components"].items() if name != "securitySchemes"}
    paths = {
        name: {method: found["paths"][name][method] for method in methods} for name, methods in PATHS.items()
    }  # fmt: skip
    for name in EVENTS:  # streams of completions are not in the document, though `stream` is
        paths[name]["post"]["responses"]["200"]["content"]["text/event-stream"] = {}
    for methods in paths.values():
        for operation in methods.values():
            # Errors are checked by `refusals_are_typed`: the document has some without the object around them that
            # OpenAI's clients look for.
            operation["responses"] = {
                "200": operation["responses"]["200"], "default": {"description": "An error."},
            }  # fmt: skip
            operation.pop("security", None)
    document = {"openapi": "3.1.0", "info": found["info"], "paths": paths, "components": components}
    return plain(document)


def plain(value: Any) -> Any:
    """`nullable`, which OpenAPI 3.1 does not have any more, as a type; without examples, which name OpenAI's models,
    and without discriminators, which repeat what `anyOf` says."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    dropped = {"nullable", "example", "discriminator"} if is_schema(value) else set()
    kept = {key: plain(item) for key, item in value.items() if key not in dropped and not key.startswith("x-")}
    return {"anyOf": [kept, {"type": "null"}]} if value.get("nullable") is True and is_schema(value) else kept


def is_schema(value: dict[str, Any]) -> bool:
    """A schema, and not a table of properties of which one is called `nullable`."""
    return any(isinstance(value.get(key), str) for key in ("type", "$ref")) or bool(
        value.keys() & {"anyOf", "oneOf", "allOf", "enum"} and not isinstance(value.get("enum"), dict)
    )
