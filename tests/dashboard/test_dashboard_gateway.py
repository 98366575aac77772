"""Both ways to the API: the application of this process, and a server over HTTP, give the same."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from boards import TOKEN, Board
from flask import Flask, Response, g, jsonify, request
from front_doors import front_door
from steering import LONGEST_WAIT_S, until

from core.errors import ConfigError, UnavailableError, VRAMancerError
from core.security.admission import DISCONNECTED_KEY
from dashboard.gateway import ApiCall, AppGateway, HttpGateway, look

Gateway = AppGateway | HttpGateway


class App:
    """A small API. `/held` streams until nobody listens."""

    def __init__(self) -> None:
        self.app = Flask(__name__)
        self.ended = threading.Event()
        self.seen: list[str] = []

        @self.app.before_request
        def note() -> None:
            g.path = request.path
            self.seen.append(request.headers.get("Authorization", ""))

        @self.app.get("/state")
        def state() -> Response:
            return jsonify({"query": request.query_string.decode()})

        @self.app.post("/echo/<name>")
        def echo(name: str) -> Response:
            told = {"Retry-After": "7", "X-Other": "x", "X-Request-ID": name}
            return Response(request.get_data(), 202, told, mimetype="application/json")

        @self.app.get("/ill")
        def ill() -> tuple[dict[str, Any], int]:
            return {"status": "error", "checks": {}}, 503

        @self.app.get("/refused")
        def refused() -> tuple[dict[str, Any], int]:
            return {"error": {"message": "Not now."}}, 409

        @self.app.get("/text")
        def text() -> str:
            return "no JSON"

        @self.app.get("/held")
        def held() -> Response:
            gone = request.environ.get(DISCONNECTED_KEY, lambda: False)

            def pieces() -> Iterator[bytes]:
                try:
                    yield b"first"
                    while not gone():
                        yield b"more"
                finally:
                    self.ended.set()

            return Response(pieces())


@contextmanager
def reached(kind: str) -> Iterator[tuple[App, Gateway]]:
    app = App()
    if kind == "app":
        gateway = AppGateway(TOKEN)
        gateway.bind(app.app.wsgi_app)
        yield app, gateway
        return
    with front_door(app.app) as (port, _):
        yield app, HttpGateway(f"http://127.0.0.1:{port}", TOKEN)


KINDS = pytest.mark.parametrize("kind", ["app", "http"])


@KINDS
def test_what_is_asked_comes_back(kind: str) -> None:
    with reached(kind) as (app, gateway):
        assert look(gateway, "/state?blocks=3") == {"query": "blocks=3"}
        answer = gateway.call(ApiCall("POST", "/echo/with space%2F", body=b'{"a": 1}'))
        assert answer.status == 202
        told = {name.lower(): value for name, value in answer.headers.items()}
        assert told["retry-after"] == "7"
        assert "x-other" not in told
        assert told["x-request-id"] == "with space%2F"
        assert answer.json() == {"a": 1}
        assert set(app.seen) == {f"Bearer {TOKEN}"}


@KINDS
def test_looks_tell_what_is_absent_from_what_is_wrong(kind: str) -> None:
    with reached(kind) as (_, gateway):
        assert look(gateway, "/ill") == {"status": "error", "checks": {}}, "a server that is not well has answered"
        with pytest.raises(VRAMancerError, match="Not now"):
            look(gateway, "/refused")
        with pytest.raises(UnavailableError, match="other than JSON"):
            look(gateway, "/text")


@KINDS
def test_an_answer_that_goes_on_ends_when_it_is_closed(kind: str) -> None:
    with reached(kind) as (app, gateway):
        answer = gateway.call(ApiCall("GET", "/held"))
        assert next(iter(answer.pieces)).startswith(b"first")
        answer.close()
        answer.close()
        assert app.ended.wait(LONGEST_WAIT_S)
    with reached(kind) as (app, gateway):
        gateway.call(ApiCall("GET", "/held")).close()  # not even begun to be read
        if kind == "http":
            assert app.ended.wait(LONGEST_WAIT_S)


def test_in_one_process_the_client_that_left_is_passed_on() -> None:
    with reached("app") as (app, gateway):
        left = threading.Event()
        answer = gateway.call(ApiCall("GET", "/held", gone=left.is_set))
        pieces = iter(answer.pieces)
        assert next(pieces) == b"first"
        left.set()
        assert len(list(pieces)) <= 1
        assert app.ended.is_set()


def test_requests_in_one_process_do_not_share_what_flask_keeps() -> None:
    with reached("app") as (app, gateway), app.app.test_request_context("/outer"):
        g.path = "/outer"
        assert look(gateway, "/state") == {"query": ""}
        assert g.path == "/outer"
        assert request.path == "/outer"


def test_the_log_does_not_fill_with_looks(board: Board, caplog: pytest.LogCaptureFixture) -> None:
    gateway = AppGateway(TOKEN)
    gateway.bind(board.app.wsgi_app)
    with caplog.at_level("INFO"):
        assert look(gateway, "/api/queue/status")["running"] == 0
        assert "request answered" not in caplog.text
        gateway.call(ApiCall("GET", "/v1/models")).close()
        assert "request answered" in caplog.text


@pytest.mark.parametrize("url", ["", "ftp://x", "http://", "::"])
def test_what_is_no_address_is_told_so(url: str) -> None:
    with pytest.raises(ConfigError):
        HttpGateway(url, TOKEN)


def test_a_server_that_is_not_there_is_told_so() -> None:
    with reached("http") as (_, gateway):
        pass
    with pytest.raises(UnavailableError, match=r"no answer from http://127\.0\.0\.1"):
        gateway.call(ApiCall("GET", "/state"))


class Breaking(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *args: Any) -> None:
        """Quiet."""


def test_an_answer_that_breaks_off_is_an_error() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Breaking) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            gateway = HttpGateway(f"http://127.0.0.1:{server.server_port}", TOKEN)
            with pytest.raises(UnavailableError):
                look(gateway, "/state")
        finally:
            server.shutdown()
            thread.join()


def test_chat_streams_through_a_call_and_ends_with_its_reader(
    make_board: Callable[..., Board],
) -> None:
    """Through both applications: pieces come as they are made, and leaving is passed on."""
    app = App()
    gateway = AppGateway(TOKEN)
    gateway.bind(_renamed(app))
    board = make_board(gateway)
    client = board.app.test_client()
    origin = {"Origin": "http://localhost"}
    csrf = client.post("/dashboard/session", headers={**origin, "Authorization": f"Bearer {TOKEN}"}).get_json()["csrf"]
    response = client.post(
        "/dashboard/call/v1/chat/completions", headers={**origin, "X-Dashboard-Session": csrf}, json={}, buffered=False
    )
    pieces = response.iter_encoded()
    assert next(pieces) == b"first"
    assert next(pieces) == b"more"
    assert not app.ended.is_set()
    response.close()
    until(app.ended.is_set, "the answer ends")


def _renamed(app: App) -> Any:
    def wsgi(environ: dict[str, Any], start: Any) -> Any:
        held = {**environ, "PATH_INFO": "/held", "REQUEST_METHOD": "GET"}
        return app.app.wsgi_app(held, start)

    return wsgi
