"""A server that has no model of its own, and routes that other servers do not answer."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from api.api_client import TOKEN, ApiClient
from plain_settings import make_settings
from steering import LONGEST_WAIT_S
from upstreams.conftest import Ours, entry
from upstreams.servers import CHAT, NAME, Upstream, unused_url

from core.api import create_app
from core.errors import ConfigError, InvalidRequestError
from core.inference_pipeline import InferencePipeline

Alone = Callable[..., tuple[InferencePipeline, ApiClient]]


@pytest.fixture
def alone() -> Iterator[Alone]:
    """A server with these upstreams and without a model."""
    with ExitStack() as opened:

        def start(*upstreams: Any, **more: Any) -> tuple[InferencePipeline, ApiClient]:
            given = {"model__name": "none", "backend__probe_interval_s": 3600.0, "api__token": TOKEN, **more}
            pipeline = InferencePipeline(make_settings(**given, backend__upstreams=list(upstreams)))
            opened.callback(pipeline.shutdown)
            pipeline.open_without_model()
            return pipeline, ApiClient(create_app(pipeline))

        yield start


def test_a_server_without_a_model_serves_others(alone: Alone, other: Upstream) -> None:
    pipeline, client = alone(entry(other))
    pipeline.upstreams.look()
    assert client.post("/v1/chat/completions", CHAT).get_json()["model"] == NAME
    assert client.events("/v1/chat/completions", CHAT)[-1] == "[DONE]"
    assert [card["id"] for card in client.get("/v1/models").get_json()["data"]] == [NAME]
    assert client.get("/ready").status_code == 200
    health = client.get("/health").get_json()
    assert health["failed"] == [] and "other" in health["checks"]["upstreams"]["detail"]
    error = client.error("/v1/chat/completions", {**CHAT, "model": "demo"}, status=503)
    assert error["code"] == "model_not_loaded"
    with pytest.raises(InvalidRequestError, match="say which one"):
        pipeline.load()


def test_it_is_not_ready_while_nobody_can_be_asked(alone: Alone) -> None:
    pipeline, client = alone({"name": NAME, "url": unused_url(), "model": "x"})
    pipeline.upstreams.look()
    answer = client.get("/ready")
    assert answer.status_code == 503 and "no other server" in answer.get_json()["reason"]
    assert "model" in client.get("/health").get_json()["failed"]


def test_it_may_have_a_model_later(alone: Alone, other: Upstream) -> None:
    pipeline, client = alone(entry(other), devices__devices="cpu=256MiB")
    pipeline.load("vramancer-demo")
    assert pipeline.model.name == "vramancer-demo"
    body = {**CHAT, "model": "vramancer-demo", "max_tokens": 2}
    assert client.post("/v1/chat/completions", body).get_json()["usage"]["completion_tokens"] > 0


def test_with_nothing_to_serve_it_does_not_start() -> None:
    with pytest.raises(ConfigError, match=r"backend\.upstreams, embeddings\.model"):
        make_settings(model__name="none")
    make_settings(model__name="none", embeddings__reranker="some-reranker")


OTHER_ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/messages", {"max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}]}),
    ("/v1/responses", {"input": "Hi"}),
    ("/v1/batch/completions", {"prompts": ["Hi"]}),
    ("/v1/rerank", {"query": "a", "documents": ["b"]}),
    ("/api/generate", {"prompt": "Hi"}),
    ("/api/chat", {"messages": [{"role": "user", "content": "Hi"}]}),
    ("/api/show", {}),
    ("/completion", {"prompt": "Hi"}),
    ("/tokenize", {"content": "Hi"}),
    ("/api/infer", {"token_ids": [1]}),
]


@pytest.mark.parametrize("has_own", [True, False])
@pytest.mark.parametrize(("route", "body"), OTHER_ROUTES)
def test_routes_that_others_do_not_answer_say_which_ones_do(
    ours: Callable[..., Ours], other: Upstream, route: str, body: dict[str, Any], has_own: bool
) -> None:
    server = ours(entry(other))
    if not has_own:
        server.pipeline.unload()
    response = server.client.post(route, {**body, "model": NAME})
    assert response.status_code == 400, response.text
    assert "/v1/chat/completions, /v1/completions and /v1/embeddings" in response.text
    assert other.seen == []


@pytest.mark.slow
def test_as_a_process(tmp_path: Path, other: Upstream) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VRM_")}
    own = {"HOME": str(tmp_path), "VRM_API_TOKEN": TOKEN, "VRM_API_PORT": "0", "VRM_METRICS_PORT": "0"}
    arguments = ["--api", "--model", "none", "--upstreams", f"{NAME}={other.url}"]
    with subprocess.Popen(
        [sys.executable, "-m", "vramancer.main", *arguments], env=inherited | own, stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            said = ""
            while "Ctrl-C" not in said and (line := process.stdout.readline()):
                said += line
            found = re.search(r"http://127\.0\.0\.1:\d+", said)
            assert found is not None and "none here" in said and NAME in said, said
            headers = {"X-API-TOKEN": TOKEN, "Content-Type": "application/json"}
            asked = urllib.request.Request(f"{found[0]}/v1/chat/completions", json.dumps(CHAT).encode(), headers)
            with urllib.request.urlopen(asked, timeout=LONGEST_WAIT_S) as answer:
                assert json.load(answer)["model"] == NAME
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=LONGEST_WAIT_S)
    assert process.returncode == 0
