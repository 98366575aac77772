"""`/openapi.json` says what the routes are, and `/docs` shows it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from api_client import ApiClient
from flask import Flask

from core.api import ERROR_SHAPES
from core.api.body import body_of
from core.api.openai.schemas import ChatRequest
from core.api.openapi.document import ERRORS
from core.config_schema import ModelSettings
from core.errors import UnsupportedParameterError
from core.security.access import policy_of


@pytest.fixture
def shown(app: Flask) -> dict[str, Any]:
    """Fetched without a token."""
    response = app.test_client().get("/openapi.json")
    assert (response.status_code, response.mimetype) == (200, "application/json")
    found: dict[str, Any] = response.get_json()
    return found


NO_BODY = {
    "/api/requests/<request_id>/cancel", "/api/memory/blocks/<block>/promote",
    "/api/memory/blocks/<block>/demote", "/v1/responses/<response_id>/cancel",
}  # fmt: skip
"""Routes to which nothing is posted."""


def test_every_route_is_there_with_its_methods(app: Flask, shown: dict[str, Any]) -> None:
    expected = {
        (re.sub(r"<(?:path:)?(\w+)>", r"{\1}", rule.rule), method.lower())
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    found = {(path, method) for path, methods in shown["paths"].items() for method in methods}
    assert found == expected
    ids = [operation["operationId"] for methods in shown["paths"].values() for operation in methods.values()]
    assert len(ids) == len(set(ids))


def test_who_may_call_is_what_the_policies_say(app: Flask, shown: dict[str, Any]) -> None:
    for rule in app.url_map.iter_rules():
        declared = policy_of(app.view_functions[rule.endpoint])
        assert declared is not None
        path = re.sub(r"<(?:path:)?(\w+)>", r"{\1}", rule.rule)
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}:
            operation = shown["paths"][path][method.lower()]
            assert operation["x-role"] == (declared.role or "public")
            assert bool(operation["security"]) is (declared.role is not None)


def test_what_is_posted_is_described(app: Flask, shown: dict[str, Any]) -> None:
    without = set()
    for rule in app.url_map.iter_rules():
        if "POST" not in (rule.methods or ()):
            continue
        operation = shown["paths"][re.sub(r"<(?:path:)?(\w+)>", r"{\1}", rule.rule)]["post"]
        body = body_of(app.view_functions[rule.endpoint])
        if body is None:
            without.add(rule.rule)
            assert "requestBody" not in operation
            continue
        found = operation["requestBody"]["content"]["application/json"]["schema"]
        for each, reference in zip(body.schemas, found.get("anyOf", [found]), strict=True):
            schema = shown["components"]["schemas"][reference["$ref"].rpartition("/")[2]]
            assert set(each.model_fields) <= set(schema["properties"])
        assert operation["requestBody"]["required"] is not body.optional
    assert without == NO_BODY


def test_references_lead_somewhere(shown: dict[str, Any]) -> None:
    names = set(re.findall(r'"\$ref": "#/components/schemas/(\w+)"', str(shown).replace("'", '"')))
    assert names
    assert names <= set(shown["components"]["schemas"])


def test_schemas_are_json_schemas(shown: dict[str, Any]) -> None:
    thinking = shown["components"]["schemas"]["Thinking"]["properties"]["budget_tokens"]
    assert {"type": "integer", "minimum": 1024} in thinking["anyOf"]
    assert not re.search(r"'(ge|le|gt|lt)':", str(shown))
    messages = shown["components"]["schemas"]["MessagesRequest"]
    assert set(messages["required"]) == {"model", "messages", "max_tokens"}


def test_a_load_takes_what_the_settings_take(shown: dict[str, Any]) -> None:
    fields = shown["components"]["schemas"]["LoadRequest"]["properties"]
    settings = ModelSettings.model_json_schema()["properties"]
    for name in ("dtype", "quantize", "quantize_group", "tool_parser", "reasoning_parser"):
        taken, known = (
            [each for each in _choices(field) if each is not None] for field in (fields[name], settings[name])
        )
        assert taken == known, name


def _choices(field: dict[str, Any]) -> list[Any]:
    return [each for part in (field, *field.get("anyOf", ())) for each in part.get("enum", ())]


def test_what_is_not_supported_takes_what_it_says(shown: dict[str, Any]) -> None:
    properties = shown["components"]["schemas"]["ChatRequest"]["properties"]
    for name in ChatRequest.unsupported:
        for value in properties[name]["enum"]:
            ChatRequest.refuse_unsupported({name: value})
        with pytest.raises(UnsupportedParameterError):
            ChatRequest.refuse_unsupported({name: "something else"})


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/api/chat", "/v1/responses"])
def test_errors_have_the_shape_that_it_says(client: ApiClient, shown: dict[str, Any], path: str) -> None:
    error = client.post(path, {"model": "unheard-of", "messages": 3}).get_json()
    reference = shown["paths"][path]["post"]["responses"]["4XX"]["content"]["application/json"]["schema"]["$ref"]
    schema = ERRORS[reference.rpartition("/")[2]]
    assert set(schema["required"]) <= set(error)
    inner = schema["properties"]["error"]
    if inner["type"] == "string":
        assert isinstance(error["error"], str)
    else:
        assert set(inner["required"]) <= set(error["error"])


def test_every_shape_has_a_schema(app: Flask, shown: dict[str, Any]) -> None:
    named = {path: str(shown["paths"][path]) for path in ERROR_SHAPES}
    assert all("AnthropicError" in text or "OllamaError" in text for text in named.values())


def test_streams_say_what_they_are(shown: dict[str, Any]) -> None:
    def types(path: str) -> set[str]:
        return set(shown["paths"][path]["post"]["responses"]["200"]["content"])

    assert types("/v1/messages") == types("/v1/responses") == {"application/json", "text/event-stream"}
    assert types("/api/chat") == {"application/json", "text/event-stream", "application/x-ndjson"}
    assert types("/v1/batch/completions") == types("/tokenize") == {"application/json"}


USER = {"role": "user", "content": "a"}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/messages": {"model": "demo", "max_tokens": 5, "messages": [USER]},
    "/v1/messages/count_tokens": {"model": "demo", "messages": [USER]},
    "/v1/responses": {"input": "a"},
    "/api/chat": {"model": "demo", "messages": [USER]},
    "/api/generate": {"prompt": "a"},
    "/api/show": {"model": "demo"},
    "/completion": {"prompt": "a"},
    "/infill": {"input_prefix": "a", "input_suffix": "b"},
    "/apply-template": {"messages": [USER]},
    "/tokenize": {"content": "a"},
}
ODD: tuple[Any, ...] = (
    True, -1, 0, 1e308, 2**70, "", "x", "\x00", [], [None], [[]], [{}], [{"type": "x"}], [{"type": 3}], {},
    {"type": "x"},
    {"a": None}, [{"role": "user"}], [{"role": "assistant", "content": [{"type": "text"}]}], [{"type": "function"}],
)  # fmt: skip


@pytest.mark.parametrize("path", sorted(BODIES))
def test_odd_values_are_never_a_fault_of_the_server(client: ApiClient, shown: dict[str, Any], path: str) -> None:
    reference = shown["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    properties = shown["components"]["schemas"][reference.rpartition("/")[2]]["properties"]
    for name in properties:
        for value in ODD:
            response = client.post(path, {**BODIES[path], name: value})
            assert response.status_code < 500, (name, value, response.text)
            response.close()


def test_the_page_shows_every_route(app: Flask, shown: dict[str, Any]) -> None:
    response = app.test_client().get("/docs")
    assert (response.status_code, response.mimetype) == (200, "text/html")
    for path, methods in shown["paths"].items():
        for method in methods:
            assert f"{method.upper()} {path}</code>" in response.text.replace("&lt;", "<").replace("&gt;", ">")
    assert "<script" not in response.text
    assert "script-src" not in response.headers["Content-Security-Policy"]
    assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")
