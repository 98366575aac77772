"""The dashboard of a real server: the demo model behind the real front door."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

import pytest
from cli.live.live_cases import QUICK_S, dashboard_on
from front_doors import serving
from steering import LONGEST_WAIT_S, until, with_each_step

from core.api import create_app
from core.api.context import WATCHED_RULES
from core.inference_pipeline import InferencePipeline
from core.request import SamplingParams
from vramancer.cli.live.connection import KeptClient
from vramancer.cli.live.look import Inquiry
from vramancer.cli.live.watch import Watcher

LONG = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)


@pytest.fixture
def pipeline(open_pipeline: Callable[..., InferencePipeline]) -> InferencePipeline:
    return open_pipeline(devices__devices="cpu=64MiB,cpu=64MiB", api__token="secret", memory__host_bytes=1 << 24)


@pytest.fixture
def watcher(pipeline: InferencePipeline) -> Iterator[Watcher]:
    with serving(create_app(pipeline)) as port:
        yield Watcher(lambda: KeptClient(f"http://127.0.0.1:{port}", "secret"), QUICK_S)


def test_a_server_at_work_and_a_request_that_is_cancelled(pipeline: InferencePipeline, watcher: Watcher) -> None:
    """The engine makes a step at a time, so that the request is still there when it is cancelled."""
    step = threading.Semaphore(0)
    with dashboard_on(watcher, width=100, height=30) as shown:
        shown.until("vramancer-demo  ready  up ")
        shown.until("Requests  none")
        with with_each_step(pipeline, lambda: step.acquire(timeout=LONGEST_WAIT_S)):
            try:
                handle = pipeline.submit([5] * 20, LONG, request_id="long-one")
                step.release(8)
                shown.until("long-one        running")
                for text in ("cpu#0 ", "cpu#1 ", "main memory ", "Speed ", "1 running of ", "█ weights"):
                    shown.until(text)
                shown.type("2")
                shown.until("0 cpu#0")
                shown.until("1 cpu#1")
                shown.type("3")
                shown.until(">  long-one")
                shown.type("c")
                shown.until("Cancel long-one? y: yes, any other key: no")
                shown.type("y")
                shown.until("long-one is cancelled.")
            finally:
                step.release(10_000)
            output = handle.result(LONGEST_WAIT_S)
        assert [each.finish_reason for each in output.completions] == ["abort"]
        shown.until("Requests  0 running, 0 waiting")
        shown.type("4")
        shown.until("Tiers ")
        assert "main memory" in shown.text
    assert (shown.status, shown.error) == (0, None)


def test_a_server_in_read_only_mode_cancels_nothing(open_pipeline: Callable[..., InferencePipeline]) -> None:
    pipeline = open_pipeline(api__token="secret", security__read_only=True)
    with serving(create_app(pipeline)) as port:
        watcher = Watcher(lambda: KeptClient(f"http://127.0.0.1:{port}", "secret"), QUICK_S)
        said: list[str] = []
        watcher.cancel("any", said.append)
        until(lambda: said, "what came of it")
        watcher.stop()
    assert said[0].startswith("any is not cancelled: The server is in read-only mode")


def test_looks_do_not_fill_the_log(pipeline: InferencePipeline, caplog: pytest.LogCaptureFixture) -> None:
    def logged() -> list[str]:
        lines = [record.msg for record in caplog.records if isinstance(record.msg, dict)]
        return [line["path"] for line in lines if line["event"] == "request answered"]

    with serving(create_app(pipeline)) as port, caplog.at_level(logging.INFO):
        client = KeptClient(f"http://127.0.0.1:{port}", "secret")
        Inquiry(client).look()
        client.get("/api/models")
        client.close()
    assert "/api/models" in logged()
    assert not set(logged()) & WATCHED_RULES
    assert logged().count("unmatched") <= 1, "tasks, where there are none"
