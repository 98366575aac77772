"""`/api/models/load` and `/api/models/unload` with other servers, their settings, and the stub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from upstreams.conftest import Ours, entry
from upstreams.servers import CHAT, MODEL, NAME, Upstream, unused_url

from core.config import load_settings
from core.errors import ConfigError
from core.upstreams.stub import STUB_HEADER, STUB_NAME, STUB_TEXT

SECRET = "do-not-tell"


def load(server: Ours, status: int = 200, **body: Any) -> Any:
    response = server.client.post("/api/models/load", {"model": NAME, **body})
    assert response.status_code == status, response.text
    return response.get_json()


def test_a_server_is_taken_in_and_let_go(
    ours: Callable[..., Ours], other: Upstream, caplog: pytest.LogCaptureFixture
) -> None:
    server = ours()
    assert server.client.post("/v1/chat/completions", CHAT).status_code == 404
    loaded = load(server, url=other.url.removesuffix("/v1"), upstream_model=MODEL, api_key=SECRET)
    assert loaded["available"] is True
    (replica,) = loaded["replicas"]
    assert (replica["url"], replica["backend"], replica["model"]) == (other.url, "vllm", MODEL)
    assert server.client.post("/v1/chat/completions", CHAT).get_json()["model"] == NAME
    assert other.seen[0][1]["Authorization"] == f"Bearer {SECRET}"
    listed = server.client.get("/api/models").get_json()
    assert [group["name"] for group in listed["upstreams"]] == [NAME]
    assert server.client.post("/api/models/unload", {"model": NAME}).get_json() == {"unloaded": NAME}
    assert server.client.post("/v1/chat/completions", CHAT).status_code == 404
    assert server.pipeline.loaded, "our own model stays"
    assert SECRET not in caplog.text + str(listed) + str(loaded)


def test_a_second_load_adds_a_replica(ours: Callable[..., Ours], other: Upstream) -> None:
    server = ours()
    load(server, url="self")
    assert len(load(server, url=other.url)["replicas"]) == 2
    assert load(server, 409, url=other.url)["error"]["code"] == "conflict"


def test_our_models_own_name_is_not_taken_over(ours: Callable[..., Ours], other: Upstream) -> None:
    server = ours()
    body = {"model": "demo", "url": other.url}
    assert "self" in server.client.error("/api/models/load", body, status=409)["message"]
    assert server.client.post("/api/models/load", {"model": "demo", "url": "self"}).status_code == 200
    assert len(server.client.post("/api/models/load", body).get_json()["replicas"]) == 2


@pytest.mark.parametrize(
    "url",
    ["ftp://host/v1", "file:///etc/passwd", "host:8000", "http://", "http://u:pass1@host/", "http://host/?a=b",
     "http://host:99999/", "http://ho st/", "gopher://h", "http://h/#x", "HTTP:/h"],
)  # fmt: skip
def test_addresses_that_are_refused(ours: Callable[..., Ours], url: str) -> None:
    error = load(ours(), 400, url=url)["error"]
    assert error["param"] == "url" and "pass1" not in error["message"]


def test_what_a_load_refuses(ours: Callable[..., Ours], other: Upstream) -> None:
    server = ours()
    assert load(server, 502, url=unused_url())["error"]["code"] == "upstream_unusable"
    assert "It has no model" in load(server, 502, url=other.url, upstream_model="x")["error"]["message"]
    assert load(server, 400, url=other.url, num_gpus=1)["error"]["param"] == "num_gpus"
    assert load(server, 400, url=other.url, backend="unheard-of")["error"]["param"] == "backend"
    assert load(server, 400, url=other.url, api_key="a\nb: c")["error"]["param"] == "api_key"
    assert server.pipeline.upstreams.groups() == []


def test_unloading_what_is_not_there(ours: Callable[..., Ours]) -> None:
    server = ours()
    assert server.client.post("/api/models/unload", {"model": "nobody"}).status_code == 404
    assert server.pipeline.loaded
    assert server.client.post("/api/models/unload").get_json() == {"unloaded": "demo"}


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{upstreams: [{name: a, url: 'ftp://h', api_key: do-not-tell}]}", "backend.upstreams[0].url"),
        ("{upstreams: [{name: a, api_key: do-not-tell}]}", "backend.upstreams[0].url"),
        ("{upstreams: [{name: a, url: 'http://h', key: do-not-tell}]}", "backend.upstreams[0].key"),
        ("{upstreams: ['a=http://u:do-not-tell@h/']}", "backend.upstreams[0].url"),
        ("{upstreams: [a=self, a=self]}", "twice"),
        ("{upstream_keys: do-not-tell}", "backend.upstream_keys"),
        ("{upstream_keys: b=do-not-tell, upstreams: [a=self]}", "'b'"),
    ],
)
def test_settings_that_are_wrong_are_named_and_not_quoted(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"backend: {text}\n")
    with pytest.raises(ConfigError) as caught:
        load_settings(path, {"HOME": str(tmp_path)})
    assert said in caught.value.message and SECRET not in caught.value.message


def test_settings_from_the_environment(tmp_path: Path) -> None:
    environ = {
        "HOME": str(tmp_path), "VRM_BACKEND_UPSTREAMS": "a=http://h:1/, a=self ,b=https://k/api/v1/",
        "VRM_BACKEND_UPSTREAM_KEYS": "a=1,b=2",
    }  # fmt: skip
    empty = tmp_path / "config.yaml"
    empty.touch()
    backend = load_settings(empty, environ).backend
    assert [(one.name, one.url) for one in backend.upstreams] == [
        ("a", "http://h:1/v1"), ("a", "self"), ("b", "https://k/api/v1"),
    ]  # fmt: skip
    assert [backend.key_of(one) for one in backend.upstreams] == ["1", "1", "2"]


# -- the stub ----------------------------------------------------------------------------------------------------------


def test_the_stub_says_what_it_is(ours: Callable[..., Ours]) -> None:
    server = ours(allow_stub=True)
    answer = server.client.post("/v1/chat/completions", {**CHAT, "model": "demo"})
    assert STUB_HEADER not in answer.headers, "our own model answers as long as it is there"
    server.pipeline.unload()
    answer = server.client.post("/v1/chat/completions", CHAT)
    assert answer.headers[STUB_HEADER] == "1"
    assert answer.get_json()["model"] == STUB_NAME
    assert answer.get_json()["choices"][0]["message"]["content"] == STUB_TEXT
    events = server.client.events("/v1/chat/completions", CHAT)
    assert [event["model"] for event in events[:-1]] == [STUB_NAME] * 2
    text = server.client.post("/v1/completions", {"prompt": "a"}).get_json()
    assert text["choices"][0]["text"] == STUB_TEXT and text["object"] == "text_completion"
    assert [card["id"] for card in server.client.get("/v1/models").get_json()["data"]] == [STUB_NAME]
    assert server.client.error("/v1/embeddings", CHAT, status=503)["code"] == "model_not_loaded"
    assert server.client.get("/ready").status_code == 503


def test_without_leave_there_is_no_stub(ours: Callable[..., Ours]) -> None:
    server = ours()
    server.pipeline.unload()
    assert server.client.error("/v1/chat/completions", CHAT, status=503)["code"] == "model_not_loaded"


def test_where_an_upstream_is_there_is_no_stub(ours: Callable[..., Ours], other: Upstream) -> None:
    server = ours(entry(other), allow_stub=True)
    server.pipeline.unload()
    assert server.client.error("/v1/chat/completions", {**CHAT, "model": "x"}, status=503)["code"] == "model_not_loaded"


def test_production_refuses_the_stub(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), "VRM_PRODUCTION": "1", "VRM_BACKEND_ALLOW_STUB": "1"}
    with pytest.raises(ConfigError, match=r"backend\.allow_stub is not allowed together with security\.production"):
        load_settings(None, environ)
