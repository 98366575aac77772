"""Other servers, as they are and as they should not be: real HTTP on the loopback interface."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from steering import LONGEST_WAIT_S

MODEL = "theirs/model-7b"
"""What the upstream calls its model."""
NAME = "other"
"""What our clients call it."""
CHAT = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}]}


class Upstream:
    """Answers POSTs as `behave(talk)` does; its model is listed. `seen` has requests in order: path, headers, body."""

    def __init__(self, httpd: ThreadingHTTPServer) -> None:
        self.url = f"http://127.0.0.1:{httpd.server_port}/v1"
        self.seen: list[tuple[str, dict[str, str], Any]] = []
        self.behave: Callable[[Talk], None] = whole("Hello")
        self.owner = "vllm"
        self.models = [MODEL]
        self.pages: dict[str, Any] = {}
        self.left = threading.Event()
        """Set once a client has closed a connection that was waited on."""
        self.released = threading.Event()
        """For behaviours that wait; set at the end of the test."""
        self.connections: list[socket.socket] = []

    def asked(self) -> int:
        return len(self.seen)


class Talk(BaseHTTPRequestHandler):
    """One request of a client."""

    protocol_version = "HTTP/1.1"

    @property
    def upstream(self) -> Upstream:
        upstream: Upstream = self.server.upstream  # type: ignore[attr-defined]
        return upstream

    def setup(self) -> None:
        super().setup()
        self.upstream.connections.append(self.connection)

    def do_GET(self) -> None:
        up = self.upstream
        cards = [{"id": name, "object": "model", "owned_by": up.owner} for name in up.models]
        pages = {"/v1/models": {"object": "list", "data": cards}, **up.pages}
        with suppress(OSError):
            self.answer(200 if self.path in pages else 404, pages.get(self.path, {"error": {"message": "not here"}}))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.upstream.seen.append((self.path, dict(self.headers.items()), json.loads(body)))
        self.body = json.loads(body)
        with suppress(OSError):
            self.upstream.behave(self)

    def answer(self, status: int, values: Any, **headers: str) -> None:
        self.raw(status, json.dumps(values).encode(), **headers)

    def raw(self, status: int, data: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def open_stream(self) -> None:
        """A body that ends with the connection."""
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()

    def event(self, values: Any) -> None:
        self.wfile.write(b"data: " + (values if isinstance(values, bytes) else json.dumps(values).encode()) + b"\n\n")
        self.wfile.flush()

    def text(self, text: str, **more: Any) -> None:
        """A chunk of a chat."""
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
        self.event({"id": "theirs", "object": "chat.completion.chunk", "model": MODEL, "choices": [choice], **more})

    def wait_until_left(self) -> None:
        """Say nothing until the client closes the connection, or the test ends."""
        self.connection.settimeout(0.05)
        while not self.upstream.released.is_set():
            try:
                if self.connection.recv(1) == b"":
                    self.upstream.left.set()
                    return
            except TimeoutError:
                continue
            except OSError:
                self.upstream.left.set()
                return

    def die(self) -> None:
        """Break the connection off, as a process that is killed."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args: Any) -> None:
        """Quiet."""


def whole(text: str) -> Callable[[Talk], None]:
    """Answers in full, streamed where that was asked for, one letter at a time."""

    def behave(talk: Talk) -> None:
        usage = {"prompt_tokens": 3, "completion_tokens": len(text), "total_tokens": 3 + len(text), "theirs": 1}
        if not talk.body.get("stream"):
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            talk.answer(
                200, {"id": "theirs", "model": MODEL, "choices": [choice], "usage": usage, "vendor": {"a": [1]}}
            )
            return
        talk.open_stream()
        for letter in text:
            talk.text(letter)
        end = {"index": 0, "delta": {}, "finish_reason": "stop"}
        talk.event({"id": "theirs", "model": MODEL, "choices": [end]})
        talk.event({"id": "theirs", "model": MODEL, "choices": [], "usage": usage})
        talk.event(b"[DONE]")

    return behave


def dying(text: str) -> Callable[[Talk], None]:
    """Streams some letters, then closes the connection (a reset could overtake them)."""

    def behave(talk: Talk) -> None:
        talk.open_stream()
        for letter in text:
            talk.text(letter)

    return behave


def refusing(status: int, message: str = "no", **headers: str) -> Callable[[Talk], None]:
    return lambda talk: talk.answer(status, {"error": {"message": message, "type": "x", "code": 7}}, **headers)


@contextmanager
def upstream(behave: Callable[[Talk], None] | None = None) -> Iterator[Upstream]:
    """One on a free port. It has ended afterwards."""
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Talk)
    httpd.daemon_threads = False
    found = Upstream(httpd)
    found.behave = behave or found.behave
    httpd.upstream = found  # type: ignore[attr-defined]
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield found
    finally:
        found.released.set()
        httpd.shutdown()
        for connection in found.connections:  # which clients keep
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        httpd.server_close()
        thread.join(LONGEST_WAIT_S)


def unused_url() -> str:
    """Where nobody listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{one.getsockname()[1]}/v1"
