"""`run` and `status` with the demo model behind the real front door."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from front_doors import serving
from plain_settings import CACHE_DIR
from steering import LONGEST_WAIT_S, with_each_step
from typer.testing import CliRunner

from core.api import create_app
from core.inference_pipeline import InferencePipeline
from core.request import SamplingParams
from vramancer.cli import app

QUESTION = "What is the capital of France?"
GREEDY = SamplingParams(max_tokens=8, temperature=0.0)


@pytest.fixture
def pipeline(open_pipeline: Callable[..., InferencePipeline]) -> InferencePipeline:
    return open_pipeline(devices__devices="cpu=64MiB,cpu=64MiB", api__token="secret")


@pytest.fixture
def port(pipeline: InferencePipeline, environment: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Of the server, which is where the settings say."""
    with serving(create_app(pipeline)) as number:
        monkeypatch.setenv("VRM_API_PORT", str(number))
        yield number


def test_run_asks_the_server_that_runs(port: int) -> None:
    result = CliRunner().invoke(app, ["run", QUESTION, "--temperature", "0"])
    assert (result.exit_code, result.stdout.strip()) == (0, "The capital of France is Paris.")
    assert f"vramancer-demo on the server at http://127.0.0.1:{port}" in result.stderr
    assert "tok/s, first token after" in result.stderr
    named = CliRunner().invoke(app, ["run", "vramancer-demo", QUESTION, "--temperature", "0", "--max-tokens", "2"])
    assert named.exit_code == 0
    assert "2 tokens" in named.stderr
    assert "cut off" in named.stderr


def test_status_shows_the_server_at_work(port: int, pipeline: InferencePipeline) -> None:
    stepping, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        stepping.set()
        go_on.wait(LONGEST_WAIT_S)

    with with_each_step(pipeline, hold):
        handle = pipeline.submit([5] * 20, GREEDY, request_id="long-one")
        assert stepping.wait(LONGEST_WAIT_S)
        result = CliRunner().invoke(app, ["status"])
        go_on.set()
        handle.result(LONGEST_WAIT_S)
    assert result.exit_code == 0, result.output
    shown = result.stdout
    assert shown.startswith("vramancer-demo  ready, up ")
    for device in ("cpu#0", "cpu#1"):
        assert device in shown
    assert "weights 0.0" in shown
    assert "long-one  running" in shown
    assert "20 prompt" in shown
    state = json.loads(CliRunner().invoke(app, ["status", "--json"]).stdout)
    assert state["model"]["name"] == "vramancer-demo"


@pytest.mark.usefixtures("environment")
def test_run_loads_the_model_where_no_server_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("VRM_API_PORT", str(taken.getsockname()[1]))
    flags = ["--devices", "cpu=64MiB", "--cache-dir", str(CACHE_DIR), "--profile-seconds", "0.02"]
    result = CliRunner().invoke(app, ["run", QUESTION, "--temperature", "0", *flags])
    assert (result.exit_code, result.stdout.strip()) == (0, "The capital of France is Paris."), result.stderr
    assert result.stderr.startswith("loading vramancer-demo here\n")
    assert len(result.stderr.splitlines()) == 2  # that, and the speed


@pytest.mark.usefixtures("environment")
def test_status_names_the_tiers_of_a_server(open_pipeline: Callable[..., InferencePipeline]) -> None:
    pipeline = open_pipeline(devices__devices="cpu=64MiB", api__token="secret", memory__host_bytes=1 << 24)
    with serving(create_app(pipeline)) as number:
        shown = CliRunner().invoke(app, ["status", "--port", str(number)]).stdout
    assert "main memory  ......" in shown.replace("·", ".")
