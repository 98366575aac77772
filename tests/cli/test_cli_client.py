"""The commands' client, against a small server on the loopback interface."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from core.config import ApiSettings, RuntimeSettings, Settings, iter_settings
from core.errors import ConfigError, UnavailableError, VRAMancerError
from vramancer.cli import app
from vramancer.cli.client import ApiClient, read_token


class Handler(BaseHTTPRequestHandler):
    """Answers what the server's `answers` hold by path: (status, bytes). Keeps what it was asked."""

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"])))

    def _answer(self, body: bytes) -> None:
        server: Any = self.server
        server.seen.append((self.command, self.path, self.headers.get("Authorization"), body))
        status, answer = server.answers[self.path]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[Any]:
    httpd: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.seen, httpd.answers = [], {}
    httpd.url = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def events(*values: object) -> bytes:
    return b"".join(b"data: " + json.dumps(value).encode() + b"\n\n" for value in values)


def test_get_sends_the_token_and_reads_json(server: Any) -> None:
    server.answers["/base/state"] = (200, b'{"ready": true}')
    assert ApiClient(server.url + "/base/", "secret").get("/state") == {"ready": True}
    assert ApiClient(server.url + "/base", None).get("/state") == {"ready": True}
    assert [seen[2] for seen in server.seen] == ["Bearer secret", None]


def test_errors_carry_the_servers_message(server: Any) -> None:
    server.answers["/a"] = (401, b'{"error": {"message": "The API token is wrong."}}')
    server.answers["/b"] = (502, b"<html>")
    with pytest.raises(VRAMancerError, match=r"The API token is wrong\."):
        ApiClient(server.url, None).get("/a")
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


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for info in iter_settings():
        monkeypatch.delenv(info.env, raising=False)
    monkeypatch.setenv("VRM_API_TOKEN", "secret")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("environment")
def test_status_prints_what_the_server_says(server: Any) -> None:
    server.answers["/api/pipeline/status"] = (200, b'{"ready": true, "stages": [{"device": "cpu#0"}]}')
    result = CliRunner().invoke(app, ["status", "--url", server.url])
    assert result.exit_code == 0
    assert "ready: true" in result.output
    assert "device: cpu#0" in result.output
    assert server.seen[0][1:3] == ("/api/pipeline/status", "Bearer secret")
    as_json = CliRunner().invoke(app, ["status", "--port", str(server.server_port), "--json"])
    assert json.loads(as_json.output)["stages"] == [{"device": "cpu#0"}]


@pytest.mark.usefixtures("environment")
def test_status_without_a_server(server: Any) -> None:
    server.server_close()
    result = CliRunner().invoke(app, ["status", "--url", server.url])
    assert result.exit_code == 1
    assert "no answer from" in result.output


@pytest.mark.usefixtures("environment")
def test_run_talks_to_a_server(server: Any) -> None:
    server.answers["/v1/models"] = (200, b'{"data": [{"id": "tiny"}]}')
    pieces = [{"choices": [{"delta": {"content": text}}]} for text in ("Hel", "lo")]
    server.answers["/v1/chat/completions"] = (200, events(*pieces, {"choices": []}) + b"data: [DONE]\n\n")
    arguments = ["run", "--url", server.url, "--max-tokens", "5", "--system", "Be brief."]
    result = CliRunner().invoke(app, arguments, input="Hi\n/exit\n")
    assert result.exit_code == 0
    assert "Hello" in result.output
    body = json.loads(server.seen[-1][3])
    assert body == {
        "model": "tiny",
        "stream": True,
        "max_tokens": 5,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    }


@pytest.mark.parametrize(
    ("flags", "sent"),
    [
        ((), {}),
        (("--temperature", "0"), {"temperature": 0.0}),
        (("--temperature", "1.5", "--max-tokens", "7"), {"temperature": 1.5, "max_tokens": 7}),
        (("--model", "another"), {"model": "another"}),
    ],
)
@pytest.mark.usefixtures("environment")
def test_each_flag_of_run_reaches_the_server(server: Any, flags: tuple[str, ...], sent: dict[str, Any]) -> None:
    server.answers["/v1/models"] = (200, b'{"data": [{"id": "tiny"}]}')
    server.answers["/v1/chat/completions"] = (200, b"data: [DONE]\n\n")
    assert CliRunner().invoke(app, ["run", "--url", server.url, *flags], input="Hi\n").exit_code == 0
    messages = [{"role": "user", "content": "Hi"}]
    assert json.loads(server.seen[-1][3]) == {"model": "tiny", "stream": True, "messages": messages, **sent}
