"""Put in the place of the `conftest.py` of llama.cpp's server tests: they then ask our server, which runs already."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import openai
import pytest

sys.path.insert(0, os.environ["CONFORMANCE_FOLDER"])
sys.modules.setdefault("wget", types.ModuleType("wget"))  # models are not downloaded

import llamacpp_tests  # noqa: E402
import utils  # noqa: E402

PORT, TOKEN = int(os.environ["CONFORMANCE_PORT"]), os.environ["CONFORMANCE_TOKEN"]
MATCH = utils.match_regex
ASKED = utils.ServerProcess.make_request


def start(server: Any, timeout_seconds: int = 0) -> None:
    server.server_host, server.server_port = "127.0.0.1", PORT


def headers_of(server: Any, given: dict[str, Any] | None) -> dict[str, Any]:
    """With our token, unless the test brings its own."""
    return given if given is not None else {"Authorization": f"Bearer {TOKEN}"}


def make_request(server: Any, method: str, path: str, data: Any = None, headers: Any = None, **more: Any) -> Any:
    return ASKED(server, method, path, data, headers_of(server, headers), **more)


def stream_request(server: Any, method: str, path: str, data: Any = None, headers: Any = None, **more: Any) -> Any:
    return STREAMED(server, method, path, data, headers_of(server, headers), **more)


STREAMED = utils.ServerProcess.make_stream_request
utils.ServerProcess.start = start
utils.ServerProcess.stop = lambda server: None
utils.ServerProcess.make_request = make_request
utils.ServerProcess.make_stream_request = stream_request
THEIRS = openai.OpenAI


def client(*, api_key: str, **options: Any) -> openai.OpenAI:
    """OpenAI's client, with our token."""
    return THEIRS(api_key=TOKEN, **options)


openai.OpenAI = client  # type: ignore[assignment, misc]


@pytest.fixture(autouse=True)
def any_words(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another model says other words."""
    if request.node.originalname not in llamacpp_tests.FORMS:
        monkeypatch.setattr(request.module, "match_regex", lambda regex, text: isinstance(text, str))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left: list[pytest.Item] = []
    chosen: list[pytest.Item] = []
    reasons: dict[str, str] = {}
    for item in items:
        file = Path(item.path).name
        why = llamacpp_tests.reason(file, item.name)
        (chosen if why is None else left).append(item)
        if why is not None:
            reasons[f"{file}::{item.name}"] = why
    items[:] = chosen
    config.hook.pytest_deselected(items=left)
    with Path(os.environ["CONFORMANCE_REASONS"]).open("w", encoding="utf-8") as file:
        file.writelines(f"{name}\t{why}\n" for name, why in reasons.items())
