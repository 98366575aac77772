"""Who is on a port that is taken."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from core.errors import PortInUseError
from vramancer.web import listener
from vramancer.web.listener import bind_socket


@contextmanager
def answering(status: int, body: bytes) -> Iterator[int]:
    """A server that says this to everything, on a port that it gives."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body if self.path == "/health" else b"")

        def log_message(self, *given: object) -> None:
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        try:
            yield other.server_port
        finally:
            other.shutdown()
            thread.join()


def refusal(host: str, port: int) -> str:
    with pytest.raises(PortInUseError) as caught:
        bind_socket(host, port).close()
    return caught.value.message


@pytest.mark.parametrize("status", [200, 503])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_another_server_of_ours_is_named(status: int, host: str) -> None:
    with answering(status, b'{"status": "ok", "checks": {"engine": {"status": "ok"}}, "failed": []}') as port:
        message = refusal(host, port)
    assert f"{host}:{port} is in use by another VRAMancer server, which answers on /health" in message
    assert "--port" in message


@pytest.mark.parametrize("body", [b"", b"hello", b"[]", b'{"status": "ok"}', b'{"checks": null}', b'{"checks": [1]}'])
def test_others_are_other_programs(body: bytes) -> None:
    with answering(200, body) as port:
        assert "is in use by another program; choose another with --port" in refusal("127.0.0.1", port)


def test_who_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_ASK_TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "another program" in refusal("127.0.0.1", silent.getsockname()[1])
