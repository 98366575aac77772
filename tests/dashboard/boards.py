"""Dashboards for tests: one in the real application without a model, and what browsers and viewers send to it."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flask import Flask
from front_doors import front_door
from plain_settings import make_settings
from steering import LONGEST_WAIT_S

from core.api import create_app
from core.api.admission import admission_of
from core.inference_pipeline import InferencePipeline
from dashboard import AppGateway, Dashboard
from dashboard.gateway import ApiAnswer, ApiCall, ApiGateway
from vramancer.web.server import FrontDoor

TOKEN = "a-token-for-tests"
JSON = {"Content-Type": "application/json"}


class ScriptedGateway:
    """Answers what `answers` hold by path, or 404; `asked` counts. `error` is raised instead, if there is one."""

    def __init__(self, answers: dict[str, Any] | None = None) -> None:
        self.answers = answers if answers is not None else {}
        self.asked: list[str] = []
        self.error: Exception | None = None
        self._lock = threading.Lock()
        self._blocked = threading.Event()
        self._open = threading.Event()
        self._open.set()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nothing is answered meanwhile. It begins once somebody waits for an answer."""
        self._blocked.clear()
        self._open.clear()
        try:
            assert self._blocked.wait(LONGEST_WAIT_S)
            yield
        finally:
            self._open.set()

    def call(self, call: ApiCall) -> ApiAnswer:
        if not self._open.is_set():
            self._blocked.set()
        self._open.wait(2 * LONGEST_WAIT_S)
        with self._lock:
            self.asked.append(call.path)
        if self.error is not None:
            raise self.error
        if call.path not in self.answers:
            return ApiAnswer(404, {}, [b'{"error": {"message": "There is no such route."}}'])
        answer = self.answers[call.path]
        if isinstance(answer, ApiAnswer):
            return answer
        return ApiAnswer(200, {"Content-Type": "application/json"}, [json.dumps(answer).encode()])


class Board:
    """The application with its dashboard. `gateway` asks the application itself unless another is given."""

    def __init__(self, state_dir: Path, gateway: ApiGateway | None = None, **settings: Any) -> None:
        self.pipeline = InferencePipeline(make_settings(runtime__state_dir=state_dir, **settings))
        own = AppGateway(TOKEN)
        loaded = self.pipeline.settings
        self.dashboard = Dashboard(
            gateway if gateway is not None else own,
            loaded.dashboard,
            bound_to=loaded.api.host,
            max_body_bytes=loaded.api.max_body_bytes,
            version="1.2.3",
        )
        self.app: Flask = create_app(
            self.pipeline, token=TOKEN, more=[self.dashboard.blueprint], signed_in=self.dashboard.gate.signed_in
        )
        own.bind(self.app.wsgi_app)

    def close(self) -> None:
        self.dashboard.live.end()
        self.pipeline.shutdown()


@contextmanager
def served(board: Board, **limits: Any) -> Iterator[tuple[int, FrontDoor]]:
    """Behind the real front door."""
    with front_door(board.app, admission_of(board.app), live=board.dashboard.live, **limits) as (port, door):
        yield port, door


class Browser:
    """One that has signed in: its cookie, and what its pages send with their calls."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.origin = f"http://127.0.0.1:{port}"
        status, headers, body = self.send(
            "POST", "/dashboard/session", {"Origin": self.origin, "Authorization": f"Bearer {TOKEN}"}
        )
        assert status == 200, body
        self.cookie = headers["Set-Cookie"].partition(";")[0]
        self.csrf = json.loads(body)["csrf"]

    @property
    def own(self) -> dict[str, str]:
        return {"Origin": self.origin, "Cookie": self.cookie, "X-Dashboard-Session": self.csrf}

    def send(
        self, method: str, path: str, headers: dict[str, str] | None = None, body: Any = None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LONGEST_WAIT_S)
        try:
            connection.request(method, path, body, self.own if headers is None else headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()


class Viewer:
    """A page that watches, by long polling. Events are lists of name and data, other packets text."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        status, _, body = browser.send("GET", self.path)
        assert status == 200, body
        self.sid = json.loads(body[1:])["sid"]
        status, _, body = self.say("40")
        assert (status, body) == (200, b"OK")

    path = "/socket.io/?EIO=4&transport=polling"

    @property
    def own_path(self) -> str:
        return f"{self.path}&sid={self.sid}"

    def say(self, text: str) -> tuple[int, http.client.HTTPMessage, bytes]:
        return self.browser.send("POST", self.own_path, body=text)

    def fetch(self) -> list[Any]:
        status, _, body = self.browser.send("GET", self.own_path)
        assert status == 200, body
        packets = body.decode().split("\x1e")
        return [json.loads(packet[2:]) if packet.startswith("42") else packet for packet in packets]

    def next(self, name: str) -> Any:
        """The data of the next event of this name, which may take a few fetches."""
        for _ in range(200):
            for event in self.fetch():
                if isinstance(event, list) and event[0] == name:
                    return event[1]
        raise AssertionError(f"no {name} came")
