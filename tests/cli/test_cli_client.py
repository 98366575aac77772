"""The commands' client, against a small server on the loopback interface."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from cli.fake_server import events
from pydantic import SecretStr

from core.config import ApiSettings, RuntimeSettings, Settings
from core.errors import AuthenticationError, ConfigError, NotFoundError, UnavailableError, VRAMancerError
from vramancer.cli.client import ApiClient, read_token


def test_get_sends_the_token_and_reads_json(server: Any) -> None:
    server.answers["/base/state"] = (200, b'{"ready": true}')
    assert ApiClient(server.url + "/base/", "secret").get("/state") == {"ready": True}
    assert ApiClient(server.url + "/base", None).get("/state") == {"ready": True}
    assert [seen[2] for seen in server.seen] == ["Bearer secret", None]


def test_errors_carry_the_servers_message(server: Any) -> None:
    server.answers["/a"] = (401, b'{"error": {"message": "The API token is wrong."}}')
    server.answers["/b"] = (502, b"<html>")
    with pytest.raises(AuthenticationError, match=r"The API token is wrong\."):
        ApiClient(server.url, None).get("/a")
    with pytest.raises(NotFoundError, match="not here"):
        ApiClient(server.url, None).get("/c")
    with pytest.raises(VRAMancerError, match="502"):
        ApiClient(server.url, None).get("/b")


def test_a_stream_gives_events_and_skips_comments(server: Any) -> None:
    server.answers["/s"] = (200, b": keep-alive\n\n" + events({"n": 1}, {"n": 2}) + b"data: [DONE]\n\n")
    assert list(ApiClient(server.url, None).stream("/s", {"x": "é"})) == [{"n": 1}, {"n": 2}]
    assert json.loads(server.seen[0][3]) == {"x": "é"}


def test_an_error_within_a_stream_is_raised(server: Any) -> None:
    server.answers["/s"] = (200, events({"n": 1}, {"error": {"message": "step failed"}}))
    stream = ApiClient(server.url, None).stream("/s", {})
    assert next(stream) == {"n": 1}
    with pytest.raises(VRAMancerError, match="step failed"):
        next(stream)


def test_a_stream_that_breaks_off_is_an_error(server: Any) -> None:
    server.answers["/s"] = (200, events({"n": 1}))
    with pytest.raises(UnavailableError, match="too early"):
        list(ApiClient(server.url, None).stream("/s", {}))


def test_nobody_there(server: Any) -> None:
    server.server_close()
    with pytest.raises(UnavailableError, match="no answer from"):
        ApiClient(server.url, None).get("/a")


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http:///path"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="--url"):
        ApiClient(url, None)


def test_the_server_that_the_settings_describe() -> None:
    wildcard = Settings(api=ApiSettings(host="0.0.0.0", port=5030))
    assert ApiClient.for_settings(wildcard, None).url == "http://127.0.0.1:5030"
    assert ApiClient.for_settings(Settings(api=ApiSettings(host="::1")), None).url == "http://[::1]:5000"
    assert ApiClient.for_settings(wildcard, "http://other:1").url == "http://other:1"


def test_where_the_token_comes_from(tmp_path: Path) -> None:
    runtime = RuntimeSettings(state_dir=tmp_path)
    assert read_token(Settings(runtime=runtime)) is None
    (tmp_path / "api-token").write_text("generated\n")
    assert read_token(Settings(runtime=runtime)) == "generated"
    (tmp_path / "mine").write_text("in-a-file\n")
    assert read_token(Settings(runtime=runtime, api=ApiSettings(token_file=tmp_path / "mine"))) == "in-a-file"
    assert read_token(Settings(runtime=runtime, api=ApiSettings(token=SecretStr("given")))) == "given"


def test_an_answer_that_is_no_json(server: Any) -> None:
    server.answers["/a"] = (200, b"<html>")
    with pytest.raises(UnavailableError, match="no VRAMancer server"):
        ApiClient(server.url, None).get("/a")


def test_what_was_posted_is_answered(server: Any) -> None:
    server.answers["/p"] = (200, b'{"id": "x"}')
    assert ApiClient(server.url, None).post("/p", {"model": "x"}) == {"id": "x"}
    assert server.seen[-1] == ("POST", "/p", None, b'{"model": "x"}')


def test_a_server_that_says_nothing_is_given_up_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = ApiClient(f"http://127.0.0.1:{silent.getsockname()[1]}", None)
        with pytest.raises(UnavailableError, match="timed out"):
            client.get("/live", timeout_s=0.05)


@pytest.mark.parametrize(
    ("url", "given", "sent"),
    [
        (None, None, "generated"),
        ("http://127.0.0.1:1", None, "generated"),
        ("http://localhost:1", None, "generated"),
        ("http://[::1]:1", None, "generated"),
        ("http://other:5000", None, None),
        ("https://127.0.0.1.other/", None, None),
        ("http://other:5000", "mine", "mine"),
    ],
)
def test_a_generated_token_stays_on_this_machine(
    tmp_path: Path, url: str | None, given: str | None, sent: str | None
) -> None:
    (tmp_path / "api-token").write_text("generated\n")
    api = ApiSettings() if given is None else ApiSettings(token=SecretStr(given))
    assert ApiClient.for_settings(Settings(runtime=RuntimeSettings(state_dir=tmp_path), api=api), url)._token == sent
