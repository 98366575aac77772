"""No exception of any kind leaves a request: every one is an answer in OpenAI's shape, and the next one is served."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from flask import Flask, Response
from front_doors import serving
from plain_settings import make_settings

from core.api import create_app
from core.inference_pipeline import InferencePipeline
from core.security.access import policy

TOKEN = "a-token-for-tests"
RAISED: dict[str, BaseException] = {
    "system exit": SystemExit(1),
    "keyboard interrupt": KeyboardInterrupt(),
    "generator exit": GeneratorExit(),
    "recursion": RecursionError("maximum recursion depth exceeded"),
    "memory": MemoryError(),
    "assertion": AssertionError(),
    "key": KeyError("x"),
    "unicode": UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
    "stop": StopIteration(),
    "none of the usual": BaseException("something"),
}


def forever(depth: int) -> int:
    return forever(depth + 1) + 1


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Flask]:
    pipeline = InferencePipeline(make_settings(runtime__state_dir=tmp_path))
    made = create_app(pipeline, token=TOKEN)

    @made.get("/raise/<name>")
    @policy("user", waits=True)
    def raise_it(name: str) -> Response:
        raise RAISED[name.replace("-", " ")]

    @made.get("/recurse")
    @policy("user", waits=True)
    def recurse() -> Response:
        return Response(str(forever(0)))

    @made.get("/stream/<name>")
    @policy("user", waits=True)
    def stream(name: str) -> Response:
        def pieces() -> Iterator[bytes]:
            yield b"data: one\n\n"
            raise RAISED[name.replace("-", " ")]

        return Response(pieces(), mimetype="text/event-stream")

    yield made
    pipeline.shutdown()


def ask(port: int, path: str) -> tuple[int, dict[str, object]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path, headers={"X-API-TOKEN": TOKEN})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whatever_a_route_raises_is_answered(app: Flask) -> None:
    with serving(app) as port:
        for name in RAISED:
            status, body = ask(port, f"/raise/{name.replace(' ', '-')}")
            error = body["error"]
            assert isinstance(error, dict)
            assert status == (503 if name == "memory" else 500), name
            assert set(error) == {"message", "type", "param", "code"}
            assert "something" not in str(error), "what went wrong inside is in the log alone"
        assert ask(port, "/recurse")[0] == 500
        assert ask(port, "/live") == (200, {"status": "alive"})


@pytest.mark.parametrize("name", RAISED)
def test_a_stream_that_breaks_ends_alone(app: Flask, name: str) -> None:
    with serving(app) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", f"/stream/{name.replace(' ', '-')}", headers={"X-API-TOKEN": TOKEN})
        answer = connection.getresponse()
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            answer.read()
        connection.close()
        assert ask(port, "/live") == (200, {"status": "alive"})
