"""Who may call what: the token on every route, read-only mode, request ids, CORS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from api_client import TOKEN, ApiClient, openai_error
from fake_pipeline import FakePipeline
from flask import Blueprint, Flask

from core.api import BLUEPRINTS, ERROR_SHAPES, create_app
from core.security.access import ADMIN, READING_METHODS, Principal, policy_of

PUBLIC, READS, INFERS = (None, False), ("viewer", False), ("user", False)
CANCELS, OPERATES = ("user", True), ("operator", True)
EXPECTED_POLICIES = {
    "/": PUBLIC,
    "/openapi.json": PUBLIC,
    "/docs": PUBLIC,
    "/v1/completions": INFERS,
    "/v1/chat/completions": INFERS,
    "/v1/batch/completions": INFERS,
    "/v1/embeddings": INFERS,
    "/v1/rerank": INFERS,
    "/v2/rerank": INFERS,
    "/v1/reranking": INFERS,
    "/v1/score": INFERS,
    "/embeddings": INFERS,
    "/rerank": INFERS,
    "/reranking": INFERS,
    "/score": INFERS,
    "/v1/models": READS,
    "/v1/models/<path:name>": READS,
    "/completions": INFERS,
    "/chat/completions": INFERS,
    "/models": READS,
    "/models/<path:name>": READS,
    "/api/generate": INFERS,
    "/api/infer": INFERS,
    "/completion": INFERS,
    "/infill": INFERS,
    "/apply-template": INFERS,
    "/props": READS,
    "/slots": READS,
    "/api/chat": INFERS,
    "/api/embed": INFERS,
    "/api/tags": READS,
    "/api/ps": READS,
    "/api/version": READS,
    "/api/show": INFERS,
    "/v1/messages": INFERS,
    "/v1/responses": INFERS,
    "/v1/responses/<response_id>": CANCELS,
    "/v1/responses/<response_id>/input_items": INFERS,
    "/v1/responses/<response_id>/cancel": CANCELS,
    "/v1/messages/count_tokens": INFERS,
    "/tokenize": INFERS,
    "/detokenize": INFERS,
    "/api/models": READS,
    "/api/models/load": OPERATES,
    "/api/models/unload": OPERATES,
    "/api/pipeline/place": OPERATES,
    "/api/requests/<request_id>/cancel": CANCELS,
    "/api/requests/<request_id>": CANCELS,
    "/health": PUBLIC,
    "/ready": PUBLIC,
    "/live": PUBLIC,
    "/metrics": READS,
    "/api/memory": READS,
    "/api/memory/reclaim": OPERATES,
    "/api/memory/lend": OPERATES,
    "/api/memory/blocks/<block>/promote": OPERATES,
    "/api/memory/blocks/<block>/demote": OPERATES,
    "/api/pipeline/status": READS,
    "/api/gpu": READS,
    "/api/tasks": READS,
    "/api/system": READS,
    "/api/nodes": READS,
    "/api/queue/status": READS,
    "/api/batcher/stats": READS,
}


def routes(app: Flask) -> list[tuple[str, str, str]]:
    """(rule, a URL of it, method) of everything the application answers, OPTIONS aside."""
    found = []
    for rule in app.url_map.iter_rules():
        url = (
            rule.rule.replace("<path:name>", "demo")
            .replace("<request_id>", "r")
            .replace("<response_id>", "r")
            .replace("<block>", "ab")
        )
        found += [(rule.rule, url, method) for method in sorted((rule.methods or set()) - {"OPTIONS"})]
    return found


def test_every_route_declares_the_policy_that_is_expected(app: Flask) -> None:
    found = {}
    for rule in app.url_map.iter_rules():
        declared = policy_of(app.view_functions[rule.endpoint])
        assert declared is not None
        found[rule.rule] = (declared.role, declared.mutates)
        if (rule.methods or set()) - READING_METHODS:
            assert declared.mutates or declared.role == "user", "what is sent either changes something or is inferred"
        else:
            assert not declared.mutates
    assert found == EXPECTED_POLICIES


def test_a_route_without_a_policy_is_refused_at_the_start(
    pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    careless = Blueprint("careless", __name__)
    careless.get("/api/careless")(lambda: "")
    monkeypatch.setattr("core.api.BLUEPRINTS", (*BLUEPRINTS, careless))
    with pytest.raises(RuntimeError, match="/api/careless"):
        create_app(pipeline)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-API-TOKEN": "wrong"},
        {"X-API-TOKEN": ""},
        {"X-API-TOKEN": TOKEN + "x"},
        {"X-API-TOKEN": TOKEN[:-1]},
        {"X-API-TOKEN": TOKEN[1:]},
        {"X-API-TOKEN": TOKEN[0]},
        {"X-API-TOKEN": TOKEN.upper()},
        {"Authorization": f"Bearer {TOKEN[:-1]}"},
        {"Authorization": f"Bearer {TOKEN} {TOKEN}"},
        {"X-API-TOKEN": "\xff\xfe"},
        {"X-API-Key": "wrong"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer wrong"},
    ],
)
def test_every_route_but_the_public_ones_needs_the_token(
    make_pipeline: Callable[..., FakePipeline], headers: dict[str, str]
) -> None:
    app = create_app(make_pipeline(security__disable_rate_limit=True))  # type: ignore[arg-type]
    client = app.test_client()
    for rule, url, method in routes(app):
        response = client.open(url, method=method, headers=headers)
        if EXPECTED_POLICIES[rule] == PUBLIC:
            assert response.status_code == 200, (rule, method)
            continue
        assert response.status_code == 401, (rule, method)
        assert response.headers["WWW-Authenticate"] == "Bearer"
        if method != "HEAD" and rule in ERROR_SHAPES:
            assert "token" in str(response.get_json()["error"])
        elif method != "HEAD":
            assert openai_error(response)["type"] == "authentication_error"


@pytest.mark.parametrize(
    "headers",
    [
        {"X-API-TOKEN": TOKEN},
        {"x-api-key": TOKEN},
        {"Authorization": f"Bearer {TOKEN}"},
        {"Authorization": f"bearer {TOKEN}"},
        {"Authorization": "Bearer of-another-service", "x-api-key": TOKEN},
    ],
)
def test_the_token_opens_every_route(app: Flask, headers: dict[str, str]) -> None:
    client = app.test_client()
    for rule, url, method in routes(app):
        assert client.open(url, method=method, headers=headers).status_code not in (401, 403), (rule, method)


def test_what_does_not_exist_needs_the_token_too(app: Flask) -> None:
    assert app.test_client().get("/made/up").status_code == 401


def test_read_only_refuses_every_change(make_pipeline: Callable[..., FakePipeline]) -> None:
    pipeline = make_pipeline(security__read_only=True)
    app = create_app(pipeline)  # type: ignore[arg-type]
    client = ApiClient(app)
    changes = [(url, method) for rule, url, method in routes(app)
               if EXPECTED_POLICIES[rule][1] and method not in READING_METHODS]  # fmt: skip
    assert len(changes) == 11
    for url, method in [*changes, ("/made/up", "POST"), ("/api/models", "PUT")]:
        response = client.raw.open(url, method=method, headers=client.headers)
        assert response.status_code == 403, (url, method)
        assert openai_error(response)["type"] == "permission_error"
    assert not pipeline.loads
    assert not pipeline.placements
    assert client.post("/v1/completions", {"prompt": "a"}).status_code == 200
    assert client.get("/api/models").status_code == 200
    assert client.get("/made/up").status_code == 404
    assert client.raw.options("/api/models/unload").status_code == 200


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


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["a", "b"]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/batch/completions", {"prompts": ["a"]}),
        ("/api/generate", {"prompt": "a"}),
    ],
)
def test_a_request_belongs_to_whom_its_token_says(
    client: ApiClient, pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    assert client.post(path, body).status_code == 200
    assert set(pipeline.owners) == {ADMIN.owner}
    monkeypatch.setattr("core.security.access.ADMIN", Principal("somebody else", "user"))
    pipeline.owners.clear()
    client.post(path, body)
    assert set(pipeline.owners) == {"somebody else"}
