"""Who may call what: the token on every route, read-only mode, request ids, CORS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from api_client import TOKEN, ApiClient, openai_error
from fake_pipeline import FakePipeline
from flask import Flask

from core.api import create_app
from core.security.policy import INFERENCE_RULES, PUBLIC_RULES

EXPECTED_RULES = {
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/batch/completions",
    "/v1/models",
    "/v1/models/<path:name>",
    "/api/generate",
    "/api/infer",
    "/tokenize",
    "/detokenize",
    "/api/models",
    "/api/models/load",
    "/api/models/unload",
    "/api/pipeline/place",
    "/api/requests/<request_id>/cancel",
    "/api/requests/<request_id>",
    "/health",
    "/ready",
    "/live",
    "/metrics",
    "/api/memory",
    "/api/memory/reclaim",
    "/api/memory/lend",
    "/api/memory/blocks/<block>/promote",
    "/api/memory/blocks/<block>/demote",
    "/api/pipeline/status",
    "/api/gpu",
    "/api/system",
    "/api/nodes",
    "/api/queue/status",
    "/api/batcher/stats",
}


def routes(app: Flask) -> list[tuple[str, str, str]]:
    """(rule, a URL of it, method) of everything the application answers, OPTIONS aside."""
    found = []
    for rule in app.url_map.iter_rules():
        url = rule.rule.replace("<path:name>", "demo").replace("<request_id>", "r").replace("<block>", "ab")
        found += [(rule.rule, url, method) for method in sorted((rule.methods or set()) - {"OPTIONS"})]
    return found


def test_the_routes_are_those_expected(app: Flask) -> None:
    assert {rule for rule, _, _ in routes(app)} == EXPECTED_RULES
    assert PUBLIC_RULES | INFERENCE_RULES <= EXPECTED_RULES


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-API-TOKEN": "wrong"},
        {"X-API-TOKEN": ""},
        {"X-API-TOKEN": TOKEN + "x"},
        {"X-API-TOKEN": "\xff\xfe"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer wrong"},
    ],
)
def test_every_route_but_the_public_ones_needs_the_token(app: Flask, headers: dict[str, str]) -> None:
    client = app.test_client()
    for rule, url, method in routes(app):
        response = client.open(url, method=method, headers=headers)
        if rule in PUBLIC_RULES:
            assert response.status_code == 200, (rule, method)
            continue
        assert response.status_code == 401, (rule, method)
        assert response.headers["WWW-Authenticate"] == "Bearer"
        if method != "HEAD":
            assert openai_error(response)["type"] == "authentication_error"


@pytest.mark.parametrize(
    "headers", [{"X-API-TOKEN": TOKEN}, {"Authorization": f"Bearer {TOKEN}"}, {"Authorization": f"bearer {TOKEN}"}]
)
def test_the_token_opens_every_route(app: Flask, headers: dict[str, str]) -> None:
    client = app.test_client()
    for rule, url, method in routes(app):
        assert client.open(url, method=method, headers=headers).status_code not in (401, 403), (rule, method)


def test_what_does_not_exist_needs_the_token_too(app: Flask) -> None:
    assert app.test_client().get("/made/up").status_code == 401


def test_read_only_refuses_every_change(make_pipeline: Callable[..., FakePipeline]) -> None:
    pipeline = make_pipeline(security__read_only=True)
    client = ApiClient(create_app(pipeline))  # type: ignore[arg-type]
    changes: list[Any] = [
        client.post("/api/models/load", {"model": "x"}),
        client.post("/api/models/unload"),
        client.post("/api/pipeline/place", {}),
        client.post("/api/requests/r/cancel"),
        client.delete("/api/requests/r"),
        client.post("/made/up"),
    ]
    for response in changes:
        assert response.status_code == 403
        assert openai_error(response)["type"] == "permission_error"
    assert not pipeline.loads
    assert client.post("/v1/completions", {"prompt": "a"}).status_code == 200
    assert client.get("/api/models").status_code == 200


def test_read_only_still_asks_for_the_token_first(make_pipeline: Callable[..., FakePipeline]) -> None:
    app = create_app(make_pipeline(security__read_only=True))  # type: ignore[arg-type]
    assert app.test_client().post("/api/models/unload").status_code == 401


@pytest.mark.parametrize(
    ("given", "kept"),
    [("my-id.1:2/x", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("é", False), ("", False)],
)
def test_request_id_is_kept_if_it_is_sane(client: ApiClient, given: str, kept: bool) -> None:
    for path in ("/live", "/made/up"):
        answered = client.get(path, headers={"X-Request-ID": given}).headers["X-Request-ID"]
        assert (answered == given) is kept
        assert 0 < len(answered) <= 128


def test_streams_carry_the_request_id(client: ApiClient) -> None:
    response = client.post("/v1/completions", {"prompt": "a", "stream": True}, headers={"X-Request-ID": "mine"})
    assert response.headers["X-Request-ID"] == "mine"
    response.close()


def test_cors_is_off_unless_origins_are_set(client: ApiClient) -> None:
    response = client.get("/live", headers={"Origin": "https://app.example"})
    assert "Access-Control-Allow-Origin" not in response.headers


def test_cors_lets_the_given_origins_in(make_pipeline: Callable[..., FakePipeline]) -> None:
    app = create_app(make_pipeline(api__cors_origins=("https://app.example",)))  # type: ignore[arg-type]
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-token, content-type"}
    preflight = app.test_client().options("/v1/completions", headers={"Origin": "https://app.example", **asked})
    assert preflight.status_code == 200
    assert preflight.headers["Access-Control-Allow-Origin"] == "https://app.example"
    assert "x-api-token" in preflight.headers["Access-Control-Allow-Headers"].lower()
    refused = app.test_client().get("/api/gpu", headers={"Origin": "https://app.example"})
    assert refused.status_code == 401
    assert refused.headers["Access-Control-Allow-Origin"] == "https://app.example"
    other = app.test_client().options("/v1/completions", headers={"Origin": "https://evil.example", **asked})
    assert "Access-Control-Allow-Origin" not in other.headers
