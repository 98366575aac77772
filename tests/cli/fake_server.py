"""A small HTTP server on the loopback interface that answers what a test says."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handler(BaseHTTPRequestHandler):
    """Answers what the server's `answers` hold by path: (status, bytes, or a function that writes them), or 404. Keeps
    what it was asked."""

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"])))

    def _answer(self, body: bytes) -> None:
        server: Any = self.server
        server.seen.append((self.command, self.path, self.headers.get("Authorization"), body))
        status, answer = server.answers.get(self.path, (404, b'{"error": {"message": "not here"}}'))
        self.send_response(status)
        self.end_headers()
        if callable(answer):
            answer(self.wfile)
        else:
            self.wfile.write(answer)

    def log_message(self, *args: Any) -> None:
        """Quiet."""


@contextmanager
def fake_server() -> Iterator[Any]:
    """`answers` by path, `seen` in order: method, path, Authorization, body; `url`."""
    httpd: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.seen, httpd.answers = [], {}
    httpd.url = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    try:
        yield httpd
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def events(*values: object) -> bytes:
    return b"".join(b"data: " + json.dumps(value).encode() + b"\n\n" for value in values)


def streamed(*texts: str, finish_reason: str = "stop") -> bytes:
    """A streamed chat completion of one token for each text."""
    chunks: list[dict[str, Any]] = [
        {"choices": [{"delta": {"content": text}}], "usage": {"completion_tokens": number}}
        for number, text in enumerate(texts, start=1)
    ]
    end = {"choices": [{"delta": {}, "finish_reason": finish_reason}], "usage": {"completion_tokens": len(texts)}}
    return events(*chunks, end, {"choices": [], "usage": {"completion_tokens": len(texts)}}) + b"data: [DONE]\n\n"


def serves(server: Any, name: str, *texts: str) -> None:
    """The server answers as one of ours does that has loaded this model."""
    server.answers["/live"] = (200, b'{"status": "alive"}')
    card = {"id": name, "root": name}
    server.answers["/v1/models"] = (200, json.dumps({"data": [card]}).encode())
    server.answers[f"/v1/models/{name}"] = (200, json.dumps(card).encode())
    server.answers["/v1/chat/completions"] = (200, streamed(*texts))
