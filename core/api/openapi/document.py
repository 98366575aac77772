"""The OpenAPI document (3.1) of an application, read off its routes: paths and methods from the URL map, who may call
them from their policies, bodies from the schemas that they declare, texts from docstrings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flask import Flask
from werkzeug.routing import Rule

from core.api.anthropic import answers as anthropic
from core.api.body import Body, RequestModel, body_of
from core.api.errors import SHAPES
from core.api.memory import MAX_BLOCKS
from core.api.ollama import answers as ollama
from core.security.access import Policy, policy_of

OPENAPI = "3.1.0"
SCHEMA_REF = "#/components/schemas/"
SKIPPED_METHODS = {"HEAD", "OPTIONS"}
JSON, SSE, NDJSON = "application/json", "text/event-stream", "application/x-ndjson"

Shown = dict[str, Any]

ERRORS: Shown = {
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
            }
        },
    },
    "AnthropicError": {
        "type": "object",
        "required": ["type", "error"],
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
            },
        },
    },
    "OllamaError": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}},
}
SHAPE_NAMES = {anthropic.error_body: "AnthropicError", ollama.error_body: "OllamaError"}
SECURITY: Shown = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "token": {"type": "apiKey", "in": "header", "name": "X-API-TOKEN"},
    "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
QUERIES: Mapping[str, tuple[tuple[str, Shown, str], ...]] = {
    "/api/memory": (
        ("blocks", {"type": "integer", "minimum": 0, "maximum": MAX_BLOCKS}, "How many blocks of each tier to list."),
    ),
    "/v1/responses/<response_id>/input_items": (
        ("limit", {"type": "integer", "minimum": 1, "maximum": 100, "default": 20}, "How many items."),
        ("order", {"enum": ["asc", "desc"], "default": "desc"}, "Which come first."),
        ("after", {"type": "string"}, "The id of the item before them."),
    ),
}
"""What routes look for in the query, by rule."""
OTHER_TYPES: Mapping[str, tuple[str, ...]] = {
    "/": ("text/html",),
    "/docs": ("text/html",),
    "/dashboard": ("text/html",),
    "/dashboard/static/<path:name>": ("*/*",),
    "/metrics": ("text/plain", "application/openmetrics-text"),
    "/api/infer": ("application/x-safetensors", "application/octet-stream"),
    "/api/chat": (NDJSON,),
    "/api/generate": (NDJSON,),
}
"""What routes answer beside JSON and the server-sent events of those that stream."""
NOT_JSON = {"/docs", "/metrics", "/dashboard", "/dashboard/static/<path:name>"}
ARRAYS = {"/slots"}
"""Routes that answer a list."""


def document(app: Flask, version: str | None) -> Shown:
    """The document. Routes that only a browser's session opens are the dashboard's own, and are left out."""
    schemas: Shown = dict(ERRORS)
    paths: Shown = {}
    ids: dict[str, int] = {}
    for rule in sorted(app.url_map.iter_rules(), key=lambda rule: rule.rule):
        view = app.view_functions[rule.endpoint]
        declared = policy_of(view)
        if declared is None or declared.session:
            continue
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
        for method in sorted((rule.methods or set()) - SKIPPED_METHODS):
            operation = paths.setdefault(path, {})[method.lower()] = _operation(
                app, rule, method, view, declared, schemas
            )
            count = ids[operation["operationId"]] = ids.get(operation["operationId"], 0) + 1
            if count > 1:  # one function on several paths
                operation["operationId"] += f"_{count}"
    return {
        "openapi": OPENAPI,
        "info": {
            "title": "VRAMancer",
            "version": version or "0",
            "description": "One language model across devices that do not match, behind the APIs that clients know.",
        },
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": SECURITY},
    }


def _operation(
    app: Flask, rule: Rule, method: str, view: Callable[..., Any], declared: Policy, schemas: Shown
) -> Shown:
    text = " ".join((view.__doc__ or "").split())
    body = body_of(view)
    shape = app.extensions[SHAPES].get(rule.rule)
    error = {"$ref": SCHEMA_REF + SHAPE_NAMES.get(shape, "Error")}
    refusal = {"description": "What was wrong.", "content": {JSON: {"schema": error}}}
    operation: Shown = {
        "operationId": f"{rule.endpoint.replace('.', '_')}_{method.lower()}" + ("_alias" if rule.alias else ""),
        "tags": [rule.endpoint.partition(".")[0]],
        "summary": text.partition(". ")[0].rstrip(".") or rule.endpoint.rpartition(".")[2].replace("_", " "),
        "description": text,
        "parameters": [*_parameters(rule)],
        "responses": {"200": _answer(rule, body), "4XX": refusal, "5XX": refusal},
        "security": [{name: []} for name in SECURITY] if declared.role is not None else [],
        "x-role": declared.role or "public",
    }
    if body is not None:
        shown = [_schema(schema, schemas) for schema in body.schemas]
        content = {JSON: {"schema": shown[0] if len(shown) == 1 else {"anyOf": shown}}}
        operation["requestBody"] = {"required": not body.optional, "content": content}
    return operation


def _parameters(rule: Rule) -> Iterator[Shown]:
    for name in sorted(rule.arguments):
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
    for name, schema, text in QUERIES.get(rule.rule, ()):
        yield {"name": name, "in": "query", "required": False, "schema": schema, "description": text}


def _answer(rule: Rule, body: Body | None) -> Shown:
    types = list(OTHER_TYPES.get(rule.rule, ()))
    content: Shown = {} if rule.rule in NOT_JSON else {
        JSON: {"schema": {"type": "array" if rule.rule in ARRAYS else "object"}}
    }  # fmt: skip
    schemas = body.schemas if body is not None else ()
    if any("stream" in schema.model_fields and "stream" not in schema.unsupported for schema in schemas):
        types.append(SSE)
    content |= {kind: {} if kind in (SSE, NDJSON) else {"schema": {"type": "string"}} for kind in types}
    return {"description": "The answer.", "content": content}


def _schema(body: type[RequestModel], schemas: Shown) -> Shown:
    """A reference to the body's schema, which is put among the others."""
    made = body.model_json_schema(ref_template=SCHEMA_REF + "{model}")
    for name, schema in made.pop("$defs", {}).items():
        _put(schemas, name, _plain(schema))
    _put(schemas, body.__name__, _plain(made))
    return {"$ref": SCHEMA_REF + body.__name__}


def _put(schemas: Shown, name: str, schema: Shown) -> None:
    if schemas.setdefault(name, schema) != schema:
        raise RuntimeError(f"Two schemas are called {name}.")


BOUNDS = {
    "ge": "minimum", "le": "maximum", "gt": "exclusiveMinimum", "lt": "exclusiveMaximum",
}  # fmt: skip
"""What pydantic calls a bound where it stands after a validator of ours, and what JSON Schema does."""


def _plain(schema: Any) -> Any:
    """Without titles, which repeat names, and with every bound by its name in JSON Schema."""
    if isinstance(schema, list):
        return [_plain(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {BOUNDS.get(key, key): value for key, value in schema.items() if key != "title" or isinstance(value, dict)}
    return {key: _plain(value) for key, value in kept.items()}
