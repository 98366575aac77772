"""A collector on loopback that takes spans over OTLP and HTTP, and shows them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from steering import until

KINDS = {1: "internal", 2: "server"}
STATUSES = {0: "unset", 1: "ok", 2: "error"}


@dataclass(frozen=True)
class Span:
    """As it was sent. Ids are hexadecimal; `parent` is empty where there is none."""

    name: str
    trace: str
    id: str
    parent: str
    state: str
    kind: str
    began_ns: int
    ended_ns: int
    attributes: dict[str, Any]
    status: str
    message: str
    resource: dict[str, Any]

    def holds(self, other: Span) -> bool:
        return self.began_ns <= other.began_ns <= other.ended_ns <= self.ended_ns


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind) if kind else None


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def decode(body: bytes) -> Iterator[Span]:
    for group in ExportTraceServiceRequest.FromString(body).resource_spans:
        resource = _attributes(group.resource.attributes)
        for scope in group.scope_spans:
            for span in scope.spans:
                yield Span(
                    span.name, span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(), span.trace_state,
                    KINDS[span.kind], span.start_time_unix_nano, span.end_time_unix_nano, _attributes(span.attributes),
                    STATUSES[span.status.code], span.status.message, resource,
                )  # fmt: skip


class Collector:
    """`refuse` answers 503, as one that is overloaded does."""

    def __init__(self) -> None:
        self.refuse = False
        self.posts = 0
        self._lock = threading.Lock()
        self._spans: list[Span] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.path == "/v1/traces"
                collector.take(body)
                self.send_response(503 if collector.refuse else 200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *given: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def take(self, body: bytes) -> None:
        with self._lock:
            self.posts += 1
            if not self.refuse:
                self._spans.extend(decode(body))

    @property
    def spans(self) -> list[Span]:
        with self._lock:
            return list(self._spans)

    def named(self, name: str, trace: str | None = None) -> list[Span]:
        return [span for span in self.spans if span.name == name and trace in (None, span.trace)]

    def one(self, name: str, trace: str | None = None) -> Span:
        """The only span with this name, once it has come."""
        until(lambda: bool(self.named(name, trace)), f"a span {name}")
        (span,) = self.named(name, trace)
        return span

    def children(self, span: Span) -> dict[str, Span]:
        """By name, of which each occurs once."""
        found = [each for each in self.spans if each.parent == span.id and each.trace == span.trace]
        assert len({each.name for each in found}) == len(found)
        return {each.name: each for each in found}

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="collector")
        thread.start()
        try:
            yield
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()
