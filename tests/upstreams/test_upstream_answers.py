"""What goes to another server and what comes back: everything as it was, but for the model's name and the headers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from upstreams.conftest import Ours, entry
from upstreams.servers import CHAT, MODEL, NAME, Upstream, refusing, whole

from core.upstreams.call import HOPS_HEADER

UNKNOWN = {"guided_regex": "a+", "vendor_field": {"deep": [1, 2.5, None]}, "n": 1, "seed": 2**62, "top_k": -1}


def test_bodies_pass_through_but_for_the_models_name(ours: Callable[..., Ours], other: Upstream) -> None:
    server = ours(entry(other))
    answer = server.client.post("/v1/chat/completions", {**CHAT, **UNKNOWN}).get_json()
    path, _, body = other.seen[0]
    assert path == "/v1/chat/completions"
    assert body == {**CHAT, **UNKNOWN, "model": MODEL}
    assert answer["model"] == NAME
    assert answer["vendor"] == {"a": [1]}
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8, "theirs": 1}
    assert server.pipeline.submitted == [], "our engine has nothing to do with it"


def test_streams_pass_through(ours: Callable[..., Ours], other: Upstream) -> None:
    events = ours(entry(other)).client.events("/v1/chat/completions", CHAT)
    assert other.seen[0][2]["stream"] is True
    assert [event["model"] for event in events[:-1]] == [NAME] * 7
    assert "".join(event["choices"][0]["delta"]["content"] for event in events[:5]) == "Hello"
    assert events[-2]["usage"]["theirs"] == 1
    assert events[-1] == "[DONE]"


@pytest.mark.parametrize("route", ["completions", "embeddings", "chat/completions"])
def test_the_routes(ours: Callable[..., Ours], other: Upstream, route: str) -> None:
    other.behave = lambda talk: talk.answer(200, {"object": "x", "model": MODEL, "data": [0.25]})
    answer = ours(entry(other)).client.post(f"/v1/{route}", {"model": NAME, "input": ["a"], "prompt": [1, 2]})
    assert answer.get_json() == {"object": "x", "model": NAME, "data": [0.25]}
    assert other.seen[0][0] == f"/v1/{route}"


def test_only_our_headers_travel(ours: Callable[..., Ours], other: Upstream) -> None:
    server = ours(entry(other, api_key="their-key"))
    headers = {"X-Secret": "s", "Cookie": "c=1", "X-Request-ID": "mine", "Accept-Language": "fr"}
    assert server.client.post("/v1/chat/completions", CHAT, headers=headers).status_code == 200
    sent = {name.lower(): value for name, value in other.seen[0][1].items()}
    assert sent["authorization"] == "Bearer their-key"
    assert sent["x-request-id"] == "mine"
    assert set(sent) == {
        "host", "accept", "accept-encoding", "user-agent", "connection", "content-type", "content-length",
        "authorization", "x-request-id", HOPS_HEADER.lower(),
    }  # fmt: skip


def test_the_clients_token_is_never_sent(ours: Callable[..., Ours], other: Upstream) -> None:
    server = ours(entry(other))
    server.client.post("/v1/chat/completions", CHAT)
    assert "authorization" not in {name.lower() for name in other.seen[0][1]}
    assert server.client.headers["X-API-TOKEN"] not in json.dumps(other.seen)


def test_keys_come_from_the_environments_list_too(ours: Callable[..., Ours], other: Upstream) -> None:
    server = ours(entry(other), upstream_keys=f"{NAME}=of-the-list")
    server.client.post("/v1/chat/completions", CHAT)
    assert other.seen[0][1]["Authorization"] == "Bearer of-the-list"
    assert "of-the-list" not in repr(server.pipeline.settings)


def test_models_are_listed(ours: Callable[..., Ours], other: Upstream) -> None:
    server = ours(entry(other))
    server.pipeline.upstreams.look()
    cards = {card["id"]: card for card in server.client.get("/v1/models").get_json()["data"]}
    assert cards[NAME]["owned_by"] == "vllm" and cards[NAME]["root"] == MODEL and cards[NAME]["available"] is True
    assert "demo" in cards
    assert server.client.get(f"/v1/models/{NAME}").get_json() == cards[NAME]


def test_other_models_are_ours(ours: Callable[..., Ours], other: Upstream) -> None:
    server = ours(entry(other))
    answer = server.client.post("/v1/chat/completions", {**CHAT, "model": "demo"}).get_json()
    assert answer["choices"][0]["message"]["content"] == "Hello"
    assert len(server.pipeline.submitted) == 1 and other.seen == []
    assert server.client.error("/v1/chat/completions", {**CHAT, "model": "nobody"}, status=404)["param"] == "model"


@pytest.mark.parametrize(
    ("models", "settings", "found"),
    [
        ([NAME, "b"], {}, NAME),
        (["only-one"], {}, "only-one"),
        ([f"{NAME}:latest", "b"], {}, f"{NAME}:latest"),
        (["a", "b"], {"model": "b"}, "b"),
        (["a", "b"], {}, None),
        ([], {"model": "b"}, None),
    ],
)
def test_which_of_their_models_is_meant(
    ours: Callable[..., Ours], other: Upstream, models: list[str], settings: Any, found: str | None
) -> None:
    other.models = models
    server = ours({"name": NAME, "url": other.url, **settings})
    server.pipeline.upstreams.look()
    (replica,) = server.replicas
    assert replica.reachable is (found is not None)
    if found is not None:
        assert replica.model == found
    else:
        assert "It has no model" in replica.trouble


@pytest.mark.parametrize(
    ("owner", "kind"),
    [("vllm", "vllm"), ("llamacpp", "llama.cpp"), ("library", "ollama"), ("vramancer", "vramancer"), ("me", "openai"),
     (None, "openai"), ([], "openai")],
)  # fmt: skip
def test_what_a_server_is_found_to_be(ours: Callable[..., Ours], other: Upstream, owner: Any, kind: str) -> None:
    other.owner = owner
    server = ours(entry(other))
    server.pipeline.upstreams.look()
    assert server.replicas[0].kind == kind


@pytest.mark.parametrize("status", [400, 404, 413, 422, 501])
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_with_a_request_is_said_as_it_was(
    ours: Callable[..., Ours], other: Upstream, status: int, stream: bool
) -> None:
    other.behave = refusing(status, "too long")
    server = ours(entry(other), breaker_failures=1)
    response = server.client.post("/v1/chat/completions", {**CHAT, "stream": stream})
    assert response.status_code == status
    assert response.get_json() == {"error": {"message": "too long", "type": "x", "code": 7}}
    assert server.replicas[0].breaker.state == "closed"
    assert server.replicas[0].view().calls["refused"] == 1


def test_a_refusal_that_is_no_json_is_made_one(ours: Callable[..., Ours], other: Upstream) -> None:
    other.behave = lambda talk: talk.raw(404, b"<html>nothing</html>", kind="text/html")
    error = ours(entry(other)).client.error("/v1/chat/completions", CHAT, status=404)
    assert error["message"] == "status 404"


def test_circles_end(ours: Callable[..., Ours], other: Upstream) -> None:
    server = ours(entry(other))
    server.client.post("/v1/chat/completions", CHAT, headers={HOPS_HEADER: "1"})
    assert other.seen[0][1][HOPS_HEADER] == "2"
    for hops in ("3", "99999", "-1", "x"):
        error = server.client.error("/v1/chat/completions", CHAT, status=502, headers={HOPS_HEADER: hops})
        assert error["code"] == "upstream_loop"
    assert len(other.seen) == 1


def test_a_long_text_is_put_through_whole(ours: Callable[..., Ours], other: Upstream) -> None:
    other.behave = whole("é\u2028\n" * 3000)
    server = ours(entry(other))
    events = server.client.events("/v1/chat/completions", CHAT)
    texts = [event["choices"][0]["delta"].get("content", "") for event in events[:-1] if event["choices"]]
    assert "".join(texts) == "é\u2028\n" * 3000
