"""A small server whose traces go to a collector of the test."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from front_doors import serving
from steering import LONGEST_WAIT_S
from tiny_models import build_tiny
from tracing.collector import Collector

from core.api import create_app
from core.inference_pipeline import InferencePipeline

TOKEN = "a-token-for-tests-only"
HEADERS = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
DEVICES = "cpu=64MiB,cpu=64MiB"
STAGES = ("0:cpu#0", "1:cpu#1")


@dataclass
class Service:
    pipeline: InferencePipeline
    port: int

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LONGEST_WAIT_S)
        more = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, None if body is None else json.dumps(body), HEADERS | more)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, text

    def complete(self, max_tokens: int = 6, headers: dict[str, str] | None = None, **fields: Any) -> tuple[int, str]:
        body = {"prompt": [5, 6, 7, 8], "max_tokens": max_tokens, "ignore_eos": True, "seed": 1, **fields}
        return self.ask("POST", "/v1/completions", body, **headers or {})

    def end(self) -> None:
        """Shut the pipeline down, and with it send every span there is."""
        self.pipeline.shutdown()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    build_tiny("llama", path)
    return path


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """Where spans are sent, soon after they have ended."""
    collector = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    with collector.running():
        yield collector


Open = Callable[..., Service]


@pytest.fixture
def open_service(llama: Path, open_pipeline: Callable[..., InferencePipeline]) -> Iterator[Open]:
    """Start a server of two stages, with settings beside."""
    doors = []

    def start(**settings: Any) -> Service:
        defaults = {
            "devices__devices": DEVICES, "devices__layers": "2,2", "engine__cohorts": 1, "api__token": TOKEN,
            "tracing__enabled": True,
        }  # fmt: skip
        pipeline = open_pipeline(llama, **{**defaults, **settings})
        door = serving(create_app(pipeline))
        doors.append(door)
        return Service(pipeline, door.__enter__())

    yield start
    for door in doors:
        door.__exit__(None, None, None)


@pytest.fixture
def service(collector: Collector, open_service: Open) -> Service:
    return open_service()
