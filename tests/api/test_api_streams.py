"""The life of a stream: keep-alives, clients that leave, and nothing that goes on generating for nobody."""

from __future__ import annotations

import itertools
import json
import queue
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from typing import Any

import pytest
from api_client import TOKEN, ApiClient
from fake_pipeline import FakePipeline
from flask import Flask
from front_doors import front_door
from openai import APIError, OpenAI
from steering import LONGEST_WAIT_S

from core.api import create_app
from core.api.admission import admission_of
from core.api.context import EXTENSION
from core.api.generation import DONE, KEEP_ALIVE, Generation, stream_events
from core.batching.output import RequestHandle
from core.errors import StepFailedError
from core.request import RequestOutput, SamplingParams, SequenceDelta

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


class Renderer:
    """Shows each output as its index."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def chunks(self, index: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        if self.error is not None:
            raise self.error
        yield {"index": index}

    def closing(self) -> Iterator[dict[str, Any]]:
        yield {"closing": True}


class Rig:
    """A generation of two requests, fed by hand."""

    def __init__(self, gone: Callable[[], bool] = lambda: False) -> None:
        self.sink: Any = queue.SimpleQueue()
        self.aborted: list[str] = []
        self.closed = 0
        self.handles = [RequestHandle(f"g-{i}", SamplingParams(), self.aborted.append, self.sink, i) for i in range(2)]
        self.generation = Generation("g", self.handles, self.sink, client_gone=gone, on_close=self._count)

    def _count(self) -> None:
        self.closed += 1

    def put(self, index: int, *, finished: bool = False) -> None:
        self.handles[index].put(RequestOutput(f"g-{index}", (SequenceDelta(0, "x", (1,)),), 1, finished=finished))

    def events(self, renderer: Renderer | None = None, keepalive_s: float = 60.0) -> Iterator[str]:
        return stream_events(self.generation, renderer or Renderer(), keepalive_s=keepalive_s)


def test_outputs_come_in_order_of_arrival_and_end_with_done() -> None:
    rig = Rig()
    for index, finished in ((1, False), (0, True), (1, True)):
        rig.put(index, finished=finished)
    events = list(rig.events())
    data = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert data == [{"index": 1}, {"index": 0}, {"index": 1}, {"closing": True}]
    assert events[-1] == DONE
    assert rig.aborted == []
    assert rig.closed == 1


def test_closing_a_stream_aborts_what_is_unfinished() -> None:
    rig = Rig()
    rig.put(0, finished=True)
    events = rig.events()
    next(events)
    events.close()
    assert rig.aborted == ["g-1"]
    assert rig.closed == 1


def test_silence_is_filled_with_comments() -> None:
    rig = Rig()
    events = rig.events(keepalive_s=0.01)
    assert list(itertools.islice(events, 2)) == [KEEP_ALIVE, KEEP_ALIVE]
    events.close()


def test_an_engine_error_ends_the_stream_and_the_other_requests() -> None:
    rig = Rig()
    rig.put(0)
    rig.handles[1].put(StepFailedError("broken"))
    events = list(rig.events())
    assert json.loads(events[-1].removeprefix("data: "))["error"]["message"] == "broken"
    assert rig.aborted == ["g-0"]


def test_a_bug_in_mid_stream_is_an_error_event_too() -> None:
    rig = Rig()
    rig.put(0)
    (event,) = rig.events(Renderer(KeyError("a secret")))
    assert json.loads(event.removeprefix("data: "))["error"]["code"] == "internal_error"
    assert "secret" not in event
    assert rig.aborted == ["g-0", "g-1"]


def test_a_client_that_left_ends_the_stream_while_nothing_comes() -> None:
    rig = Rig(gone=lambda: True)
    assert list(rig.events()) == []
    assert rig.aborted == ["g-0", "g-1"]


def test_a_client_that_left_is_noticed_while_outputs_keep_coming(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.api.generation.POLL_INTERVAL_S", 0.0)
    rig = Rig(gone=lambda: True)
    rig.put(0)
    assert list(rig.events()) == []
    assert rig.aborted == ["g-0", "g-1"]


def test_headers_keep_proxies_from_buffering(client: ApiClient) -> None:
    response = client.post("/v1/chat/completions", {**CHAT, "stream": True})
    assert response.content_type.startswith("text/event-stream")
    assert response.headers["Cache-Control"] == "no-cache"
    assert response.headers["X-Accel-Buffering"] == "no"
    response.close()


def test_a_stream_that_is_closed_unread_is_aborted(pipeline: FakePipeline, app: Flask) -> None:
    pipeline.hold = True
    headers = {"X-API-TOKEN": TOKEN}
    body = {**CHAT, "stream": True}
    with app.test_request_context("/v1/chat/completions", method="POST", json=body, headers=headers):
        response = app.full_dispatch_request()
    assert len(app.extensions[EXTENSION].live) == 1
    response.close()
    assert len(pipeline.aborted) == 1
    assert len(app.extensions[EXTENSION].live) == 0


def test_finished_requests_are_forgotten(client: ApiClient, app: Flask) -> None:
    client.post("/v1/chat/completions", CHAT)
    client.events("/v1/chat/completions", CHAT)
    assert len(app.extensions[EXTENSION].live) == 0


# -- over a real socket ------------------------------------------------------------------------------------------------


@contextmanager
def serving(pipeline: FakePipeline) -> Iterator[int]:
    """The application on a free loopback port."""
    app = create_app(pipeline)  # type: ignore[arg-type]
    with front_door(app, admission_of(app), max_body_bytes=pipeline.settings.api.max_body_bytes) as (port, _):
        yield port


def ask(port: int, body: dict[str, Any]) -> socket.socket:
    data = json.dumps(body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"X-API-TOKEN: {TOKEN}\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.sendall(head.encode() + data)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_has_its_request_aborted(pipeline: FakePipeline, stream: bool) -> None:
    pipeline.hold = True
    with serving(pipeline) as port:
        with closing(ask(port, {**CHAT, "stream": stream})):
            assert not pipeline.abort_seen.wait(0.6), "while it is there"
        assert pipeline.abort_seen.wait(LONGEST_WAIT_S)
    text = pipeline.metrics
    assert (
        text.registry.get_sample_value(
            "vramancer_api_latency_seconds_count",
            {"path": "/v1/chat/completions", "method": "POST", "status": "200" if stream else "499"},
        )
        == 1
    )


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("token", "status"), [(TOKEN, 413), ("wrong", 401)])
def test_a_client_that_sends_too_much_gets_its_answer(
    pipeline: FakePipeline, chunked: bool, token: str, status: int
) -> None:
    part = b" " * 1_000_000
    headers = {"X-API-TOKEN": token, "Content-Type": "application/json"}
    with serving(pipeline) as port, closing(HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        body = iter([b'{"prompt": "a"}', *[part] * 20]) if chunked else part * 20
        connection.request("POST", "/tokenize", body=body, headers=headers)
        with connection.getresponse() as response:
            assert response.status == status
            assert json.loads(response.read())["error"]["message"]


def test_a_body_of_just_the_accepted_length_passes(make_pipeline: Callable[..., FakePipeline]) -> None:
    pipeline = make_pipeline(api__max_body_bytes=2048)
    headers = {"X-API-TOKEN": TOKEN, "Content-Type": "application/json"}
    start = b'{"prompt": "a"}'
    with serving(pipeline) as port, closing(HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        for length, status in ((2048, 200), (2049, 413)):
            connection.request("POST", "/tokenize", body=iter([start, b" " * (length - len(start))]), headers=headers)
            with connection.getresponse() as response:
                assert response.status == status
                response.read()
            connection.close()


def test_openais_client_reads_everything(pipeline: FakePipeline) -> None:
    with (
        serving(pipeline) as port,
        OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=TOKEN, max_retries=0) as openai,
    ):
        assert [model.id for model in openai.models.list()] == ["demo", "org/demo"]
        messages: Any = CHAT["messages"]
        answer = openai.chat.completions.create(model="demo", messages=messages, logprobs=True, top_logprobs=1)
        assert answer.choices[0].message.content == "Hello"
        assert answer.choices[0].logprobs is not None
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 5
        with openai.chat.completions.create(
            model="demo", messages=messages, stream=True, stream_options={"include_usage": True}
        ) as stream:
            chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello"
        assert chunks[-1].usage is not None
        completion = openai.completions.create(model="demo", prompt=["a", "b"], logprobs=1)
        assert [choice.text for choice in completion.choices] == ["Hello", "Hello"]
        pipeline.failing[0] = StepFailedError("broken")
        with (
            openai.chat.completions.create(model="demo", messages=messages, stream=True) as stream,
            pytest.raises(APIError, match="broken"),
        ):
            list(stream)
