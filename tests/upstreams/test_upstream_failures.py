"""Other servers that fail in every way: a clear error for the client, and no harm to anybody else."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from http.client import HTTPConnection
from typing import Any

import pytest
from api.api_client import TOKEN
from front_doors import serving
from steering import LONGEST_WAIT_S, until
from upstreams.conftest import Ours, entry
from upstreams.servers import CHAT, NAME, Talk, Upstream, dying, refusing, unused_url, whole

from core.api.generation import KEEP_ALIVE
from core.upstreams.sse import MAX_EVENT_BYTES

GOOD = {**CHAT, "model": "demo"}


def endless_line(talk: Talk) -> None:
    talk.open_stream()
    talk.wfile.write(b"data: ")
    for _ in range(MAX_EVENT_BYTES // 65536 + 200):
        talk.wfile.write(b"x" * 65536)
    talk.wait_until_left()


def endless_event(talk: Talk) -> None:
    talk.open_stream()
    for _ in range(MAX_EVENT_BYTES // 65536 + 200):
        talk.wfile.write(b"data: " + b"x" * 65536 + b"\n")
    talk.wait_until_left()


def huge_body(talk: Talk) -> None:
    talk.close_connection = True
    talk.send_response(200)
    talk.send_header("Content-Type", "application/json")
    talk.end_headers()
    while not talk.upstream.released.is_set():
        talk.wfile.write(b" " * 65536)


def half_a_body(talk: Talk) -> None:
    talk.send_response(200)
    talk.send_header("Content-Type", "application/json")
    talk.send_header("Content-Length", "1000")
    talk.end_headers()
    talk.wfile.write(b'{"id":')
    talk.die()


def no_http(talk: Talk) -> None:
    talk.wfile.write(b"\x00\xff garbage\r\n\r\n")
    talk.die()


def redirecting(talk: Talk) -> None:
    talk.answer(307, {}, Location=talk.upstream.url + "/chat/completions")


BEFORE_THE_FIRST_BYTE: list[tuple[Callable[[Talk], None], int, str]] = [
    (lambda talk: talk.die(), 502, "upstream_lost"),
    (no_http, 502, "upstream_lost"),
    (half_a_body, 502, "upstream_lost"),
    (redirecting, 502, "upstream_redirect"),
    (refusing(500, "boom"), 502, "upstream_failed"),
    (refusing(401), 502, "upstream_refused"),
    (refusing(403), 502, "upstream_refused"),
    (refusing(429), 429, "queue_full"),
    (refusing(503), 503, "upstream_unavailable"),
    (lambda talk: talk.raw(200, b"<html>", kind="text/html"), 502, "upstream_bad_answer"),
    (lambda talk: talk.raw(200, b"{not json"), 502, "upstream_bad_answer"),
    (lambda talk: talk.raw(200, b"[" * 100_000), 502, "upstream_bad_answer"),
    (lambda talk: talk.raw(200, b"[]"), 502, "upstream_bad_answer"),
    (lambda talk: talk.raw(200, b"\x1f\x8b", Content_Encoding="gzip"), 502, "upstream_bad_answer"),
    (huge_body, 502, "upstream_too_large"),
]


@pytest.mark.parametrize(("behave", "status", "code"), BEFORE_THE_FIRST_BYTE)
def test_a_whole_answer_that_fails(
    ours: Callable[..., Ours], other: Upstream, behave: Callable[[Talk], None], status: int, code: str
) -> None:
    other.behave = behave
    server = ours(entry(other), max_answer_bytes=1 << 20)
    error = server.client.error("/v1/chat/completions", CHAT, status=status)
    assert error["code"] == code
    assert len(other.seen) == 1, "a redirect is not followed, and nobody is asked twice"
    assert server.client.post("/v1/chat/completions", GOOD).status_code == 200
    view = server.replicas[0].view()
    assert (view.in_flight, view.calls["error"]) == (0, 1)
    assert view.failures == (0 if status == 429 else 1), "a server that is busy works"


STREAMS_BEFORE: list[tuple[Callable[[Talk], None], str]] = [
    (dying(""), "upstream_lost"),
    (lambda talk: talk.answer(200, {"choices": []}), "upstream_bad_answer"),
    (lambda talk: (talk.open_stream(), talk.event(b"{garbage"))[0], "upstream_bad_answer"),
    (lambda talk: (talk.open_stream(), talk.event(["no object"]))[0], "upstream_bad_answer"),
    (lambda talk: (talk.open_stream(), talk.event({"error": {"message": "bad day"}}))[0], "upstream_failed"),
    (endless_line, "upstream_too_large"),
    (endless_event, "upstream_too_large"),
]


@pytest.mark.parametrize(("behave", "code"), STREAMS_BEFORE)
def test_a_stream_that_fails_before_its_first_event_has_a_status(
    ours: Callable[..., Ours], other: Upstream, behave: Callable[[Talk], None], code: str
) -> None:
    other.behave = behave
    server = ours(entry(other))
    assert server.client.error("/v1/chat/completions", {**CHAT, "stream": True}, status=502)["code"] == code
    assert server.client.post("/v1/chat/completions", GOOD).status_code == 200


AFTER_SOME: list[tuple[Callable[[Talk], None], str]] = [
    (lambda talk: None, "upstream_lost"),
    (lambda talk: talk.event(b"{garbage"), "upstream_bad_answer"),
    (lambda talk: talk.event({"error": {"message": "bad day"}}), "upstream_failed"),
    (lambda talk: talk.wfile.write(b"data: " + b"x" * (MAX_EVENT_BYTES + 1)) and None, "upstream_too_large"),
]  # fmt: skip


@pytest.mark.parametrize(("then", "code"), AFTER_SOME)
def test_a_stream_that_fails_on_the_way_ends_with_an_error_event(
    ours: Callable[..., Ours], other: Upstream, then: Callable[[Talk], None], code: str
) -> None:
    def behave(talk: Talk) -> None:
        talk.open_stream()
        talk.text("He")
        then(talk)

    other.behave = behave
    server = ours(entry(other))
    first, last = server.client.events("/v1/chat/completions", CHAT)
    assert first["choices"][0]["delta"]["content"] == "He"
    assert last["error"]["code"] == code and last["error"]["type"] == "upstream_error"
    assert server.replicas[0].view().failures == 1


def test_a_chunked_stream_that_breaks_off(ours: Callable[..., Ours], other: Upstream) -> None:
    def behave(talk: Talk) -> None:
        talk.close_connection = True
        talk.send_response(200)
        talk.send_header("Content-Type", "text/event-stream")
        talk.send_header("Transfer-Encoding", "chunked")
        talk.end_headers()
        event = b'data: {"choices": [{"index": 0, "delta": {"content": "He"}, "finish_reason": null}]}\n\n'
        talk.wfile.write(f"{len(event):x}\r\n".encode() + event + b"\r\n40\r\ndata: {")

    other.behave = behave
    first, last = ours(entry(other)).client.events("/v1/chat/completions", CHAT)
    assert first["choices"][0]["delta"]["content"] == "He"
    assert last["error"]["code"] == "upstream_lost"


def test_a_stream_that_ends_without_done_after_its_finish_reason_is_whole(
    ours: Callable[..., Ours], other: Upstream
) -> None:
    def behave(talk: Talk) -> None:
        talk.open_stream()
        talk.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})

    other.behave = behave
    assert ours(entry(other)).client.events("/v1/chat/completions", CHAT)[-1] == "[DONE]"


def test_who_cannot_be_reached(ours: Callable[..., Ours]) -> None:
    server = ours({"name": NAME, "url": unused_url()})
    error = server.client.error("/v1/chat/completions", CHAT, status=502)
    assert error["code"] == "upstream_unreachable"
    assert server.client.get("/v1/models/" + NAME).get_json()["available"] is False


@pytest.mark.parametrize("stream", [False, True])
def test_silence_ends_by_the_read_timeout(ours: Callable[..., Ours], other: Upstream, stream: bool) -> None:
    other.behave = Talk.wait_until_left
    server = ours(entry(other), read_timeout_s=0.3)
    error = server.client.error("/v1/chat/completions", {**CHAT, "stream": stream}, status=504)
    assert error["code"] == "upstream_timeout"
    assert other.left.wait(LONGEST_WAIT_S)


def test_one_who_talks_for_ever_ends_by_the_total_timeout(ours: Callable[..., Ours], other: Upstream) -> None:
    def behave(talk: Talk) -> None:
        talk.open_stream()
        talk.text("a")
        while not talk.upstream.released.wait(0.02):
            talk.wfile.write(b": still here\n\n")

    other.behave = behave
    server = ours(entry(other), total_timeout_s=0.6)
    events = server.client.events("/v1/chat/completions", CHAT)
    assert events[-1]["error"]["code"] == "upstream_timeout"


def test_a_silent_stream_is_kept_open(ours: Callable[..., Ours], other: Upstream, tmp_path: Any) -> None:
    """What fails after a comment is an event, since the status has gone."""
    told = threading.Event()

    def behave(talk: Talk) -> None:
        assert told.wait(LONGEST_WAIT_S)
        talk.open_stream()
        talk.event({"error": {"message": "late"}})

    other.behave = behave
    server = ours(entry(other))
    object.__setattr__(server.pipeline.settings.api, "keepalive_comment_s", 0.05)
    response = server.client.post("/v1/chat/completions", {**CHAT, "stream": True}, buffered=False)
    pieces = response.iter_encoded()
    assert next(pieces).decode() == KEEP_ALIVE
    told.set()
    rest = b"".join(pieces).decode()
    assert "failed: late" in rest and "upstream_failed" in rest and "[DONE]" not in rest


def test_the_breaker_opens_and_closes(ours: Callable[..., Ours], other: Upstream) -> None:
    clock = [0.0]
    server = ours(entry(other), breaker_failures=2, breaker_reset_s=30.0)
    breaker = server.replicas[0].breaker
    breaker._clock = lambda: clock[0]
    other.behave = dying("He")
    for _ in range(2):
        assert "error" in server.client.events("/v1/chat/completions", CHAT)[-1]
    error = server.client.error("/v1/chat/completions", CHAT, status=503)
    assert error["code"] == "upstream_unavailable" and "30 s" in error["message"]
    assert server.client.post("/v1/chat/completions", CHAT).headers["Retry-After"] == "30"
    assert len(other.seen) == 2, "while it is open, nobody is asked"
    assert server.client.post("/v1/chat/completions", GOOD).status_code == 200
    assert metric(server, "upstream_breaker_open") == 1.0
    clock[0] = 31.0
    assert breaker.state == "half_open"
    assert "error" in server.client.events("/v1/chat/completions", CHAT)[-1]
    assert breaker.state == "open", "one more failure opens it again"
    clock[0] = 62.0
    other.behave = whole("Hello")
    assert server.client.post("/v1/chat/completions", CHAT).status_code == 200
    assert breaker.state == "closed"
    assert metric(server, "upstream_breaker_open") == 0.0


def metric(server: Ours, name: str) -> float | None:
    from prometheus_client import CollectorRegistry

    from core.views.upstream_metrics import upstream_metrics

    class Now:
        def collect(self) -> Any:
            return list(upstream_metrics(server.pipeline.upstreams.groups()))

    registry = CollectorRegistry()
    registry.register(Now())  # type: ignore[arg-type]
    replica = server.replicas[0].name
    return registry.get_sample_value(f"vramancer_{name}", {"model": NAME, "replica": replica})


def test_health_says_which_upstream_is_ill(ours: Callable[..., Ours], other: Upstream) -> None:
    server = ours(entry(other), {"name": "gone", "url": unused_url()})
    server.pipeline.upstreams.look()
    body = server.client.get("/health").get_json()
    check = body["checks"]["upstreams"]
    assert check["status"] == "degraded" and "gone at" in check["detail"]
    assert body["status"] == "degraded" and body["failed"] == []
    assert server.client.get("/health").status_code == 200, "our own model is well"
    public = server.client.raw.get("/health").get_json()["checks"]["upstreams"]
    assert public == {"status": "degraded"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_closes_the_upstreams_connection(
    ours: Callable[..., Ours], other: Upstream, stream: bool
) -> None:
    def behave(talk: Talk) -> None:
        if stream:
            talk.open_stream()
            talk.text("He")
        talk.wait_until_left()

    other.behave = behave
    server = ours(entry(other))
    with serving(server.app) as port:
        connection = HTTPConnection("127.0.0.1", port, timeout=LONGEST_WAIT_S)
        headers = {"X-API-TOKEN": TOKEN, "Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps({**CHAT, "stream": stream}), headers)
        if stream:
            assert b"He" in connection.getresponse().readline()
        until(lambda: other.seen, "the upstream is asked")
        sock = connection.sock
        if sock is not None:
            sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        assert other.left.wait(LONGEST_WAIT_S)
        until(lambda: server.replicas[0].view().in_flight == 0, "the call has ended")
    view = server.replicas[0].view()
    assert view.calls["aborted"] == 1 and view.failures == 0


def test_a_neighbour_is_served_while_an_upstream_says_nothing(ours: Callable[..., Ours], other: Upstream) -> None:
    other.behave = Talk.wait_until_left
    server = ours(entry(other))
    with serving(server.app) as port:
        headers = {"X-API-TOKEN": TOKEN, "Content-Type": "application/json"}
        slow = HTTPConnection("127.0.0.1", port, timeout=LONGEST_WAIT_S)
        slow.request("POST", "/v1/chat/completions", json.dumps(CHAT), headers)
        until(lambda: other.seen, "the upstream is asked")
        quick = HTTPConnection("127.0.0.1", port, timeout=LONGEST_WAIT_S)
        quick.request("POST", "/v1/chat/completions", json.dumps(GOOD), headers)
        assert quick.getresponse().status == 200
        quick.close()
        slow.close()
        assert other.left.wait(LONGEST_WAIT_S)


def test_closing_ends_what_is_under_way(ours: Callable[..., Ours], other: Upstream) -> None:
    def behave(talk: Talk) -> None:
        server.pipeline.upstreams.close()
        talk.wait_until_left()

    server = ours(entry(other))
    other.behave = behave
    assert server.client.error("/v1/chat/completions", CHAT, status=502)["code"] == "upstream_lost"
    assert server.client.error("/v1/chat/completions", CHAT, status=502)["code"] == "upstream_unavailable"
