"""Bodies that follow from `/openapi.json`, and such with something wrong in them, to every route that takes one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
from api_client import ApiClient
from flask import Flask
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from json_bodies import Bodies
from jsonschema import Draft202012Validator

from core.api import body as bodies
from core.api.body import RequestModel, body_of

JSON = "application/json"
EXAMPLES = 12
MANY = settings(
    max_examples=EXAMPLES, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip


def posted(document: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Each path that a body is posted to, and its operation; without the one that takes the model away."""
    return sorted(
        (path, methods["post"])
        for path, methods in document["paths"].items()
        if "requestBody" in methods.get("post", {}) and path != "/api/models/unload"
    )


def is_json(value: Any) -> bool:
    """Without what a client cannot send."""
    if isinstance(value, dict):
        return all(is_json(item) for item in value.values())
    if isinstance(value, list):
        return all(map(is_json, value))
    return not isinstance(value, float) or math.isfinite(value)


def test_what_is_posted_is_answered_as_the_document_says(
    app: Flask, client: ApiClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No body makes the server fail; one that the document refuses is refused, with the error that it shows."""
    document = client.get("/openapi.json").get_json()
    read: list[type[RequestModel]] = []
    validated = bodies.validated

    def noting(schema: Any, body: Any) -> Any:
        read.append(schema)
        return validated(schema, body)

    monkeypatch.setattr(bodies, "validated", noting)
    views = {rule.rule: app.view_functions[rule.endpoint] for rule in app.url_map.iter_rules()}
    for path, operation in posted(document):
        read.clear()
        declared = body_of(views[path])
        assert declared is not None
        send_many(client, path, operation, document["components"])
        assert read and set(read) <= set(declared.schemas), path


def send_many(client: ApiClient, path: str, operation: Mapping[str, Any], components: Mapping[str, Any]) -> None:
    """Bodies to one route."""
    schema = operation["requestBody"]["content"][JSON]["schema"]
    error = operation["responses"]["4XX"]["content"][JSON]["schema"]
    wanted, errors = (Draft202012Validator({**each, "components": components}) for each in (schema, error))
    made = Bodies(components["schemas"])

    @MANY
    @given(body=st.one_of(made.valid(schema), made.spoiled(schema)).filter(is_json))
    def send(body: Any) -> None:
        response = client.post(path, body)
        told = f"{path} {body!r}: {response.status_code} {response.text[:500]}"
        response.close()
        assert response.status_code < 500, told
        if response.status_code >= 400:
            errors.validate(response.get_json())
        else:
            wrong = next(wanted.iter_errors(body), None)
            assert wrong is None, f"{told} though {wrong}"

    send()
