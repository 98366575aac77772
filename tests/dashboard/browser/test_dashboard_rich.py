"""Pages of a server with more to show than a test machine has: three cards, leases, alerts, tasks, percentiles."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from boards import TOKEN, Board, ScriptedGateway, served
from rich_state import answers
from watching import Open, Watched

from core.errors import UnavailableError


@pytest.fixture
def gateway() -> ScriptedGateway:
    return ScriptedGateway(answers())


@pytest.fixture
def rich(
    make_board: Callable[..., Board], gateway: ScriptedGateway, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SimpleNamespace]:
    """A served board, with Prometheus's alerts; the stages work on."""
    told: dict[str, Any] = {"name": "GPUMemoryHigh", "severity": "critical", "summary": "cuda:2 is at 94 %"}
    monkeypatch.setattr("dashboard.poller.firing", lambda url: [{**told, "labels": {"gpu": "cuda:2"}, "since": None}])
    done = threading.Event()

    def work() -> None:
        begun_s = time.monotonic()
        while not done.wait(0.2):
            for index, stage in enumerate(gateway.answers["/api/pipeline/status"]["stages"]):
                stage["busy_seconds"] = (time.monotonic() - begun_s) * (0.95 - 0.2 * index)
                stage["predicted_seconds"] = (time.monotonic() - begun_s) * 0.9

    working = threading.Thread(target=work)
    working.start()
    with served(make_board(gateway, dashboard__prometheus_url="http://prometheus.invalid")) as (port, _):
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}")
    done.set()
    working.join()


@pytest.fixture(params=["desktop", "phone"])
def watched(request: pytest.FixtureRequest, open_page: Open, rich: Any) -> Watched:
    page = open_page(rich, request.param)
    page.sign_in(TOKEN)
    return page


def test_what_is_wrong_stands_first(watched: Watched) -> None:
    alerts = watched.page.locator(".alerts")
    for text in (
        "disk: degraded",
        "192 MiB free",
        "GPUMemoryHigh",
        "cuda:2 is at 94 %",
        "store.lan:6379 does not answer",
    ):
        watched.expect(alerts).to_contain_text(text)
    watched.expect(watched.page.get_by_role("region", name="Background work")).to_contain_text("is gated")


def test_percentiles_are_drawn_and_written(watched: Watched) -> None:
    panel = watched.page.get_by_role("region", name="Latency", exact=True)
    for text in ("182 ms", "610 ms", "1.42 s", "43.1 ms", "41.0 s"):
        watched.expect(panel).to_contain_text(text)
    picture = panel.get_by_role("img")
    watched.expect(picture).to_have_attribute("aria-label", re.compile(r"p99: now 1\.42 s"))


def test_leases_are_drawn_between_the_cards(watched: Watched) -> None:
    watched.go("Memory")
    watched.expect(watched.page.locator(".lease-frame")).to_be_visible()
    watched.expect(watched.page.get_by_text("cuda:0 lends cuda:2 1.20 GiB")).to_be_visible()
    line = watched.page.locator(".lease path").first
    watched.expect(line).to_have_attribute("d", re.compile(r"M2 \d+C"))
    start, end = map(int, re.findall(r"(?:M2|10) (\d+)", line.get_attribute("d"))[:2])
    bars = [box.bounding_box() for box in watched.page.locator(".device .bar").all()]
    frame = watched.page.locator(".lease-frame").bounding_box()
    middles = [round(box["y"] - frame["y"] + box["height"] / 2) for box in bars]
    assert abs(start - middles[0]) <= 2
    assert abs(end - middles[2]) <= 2
    watched.expect(watched.page.get_by_text("71.0 °C")).to_be_visible()
    watched.expect(watched.page.get_by_role("button", name="Take back from cuda:0")).to_be_enabled()


def test_stages_show_how_busy_they_were_lately(watched: Watched) -> None:
    watched.go("Pipeline")
    stages = watched.page.locator(".stage")
    watched.expect(stages).to_have_count(3)
    watched.expect(stages.nth(0).locator(".figure b")).to_have_text(re.compile(r"^(8|9|10)\d %"))
    watched.expect(stages.nth(2)).to_contain_text("2 layers, 1.00 GiB")
    watched.expect(watched.page.locator(".rates .now")).to_contain_text("68.9 of 71.4 predicted")
    watched.expect(watched.page.get_by_role("slider")).to_have_count(2)


def test_machines_and_the_way_to_them(watched: Watched) -> None:
    watched.go("Cluster")
    watched.expect(".page-head").to_contain_text("2 nodes, workers are taken in at 10.0.0.7:5040, found by themselves")
    nodes = watched.page.locator("[aria-labelledby=nodes] .node")
    watched.expect(nodes).to_have_count(2)
    watched.expect(nodes.nth(0)).to_contain_text("layers 0–19")
    watched.expect(nodes.nth(1)).to_contain_text("142 µs")
    watched.expect(nodes.nth(1).locator(".badge")).to_have_text("Leaving")
    watched.expect("[aria-labelledby=nodes] .offer").to_contain_text("310 tokens/s of 16 streams, not 204")
    watched.expect("[aria-labelledby=left-out]").to_contain_text("it has VRAMancer 0.0.9, not 0.1.0")


def test_nothing_is_wider_than_the_screen(watched: Watched) -> None:
    for name in ("Overview", "Memory", "Pipeline", "Requests", "Cluster", "Models", "Chat"):
        watched.go(name)
        wide, screen = watched.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide <= screen, name


def test_a_server_that_stops_answering_is_said_so(watched: Watched, gateway: ScriptedGateway) -> None:
    gateway.error = UnavailableError("no answer from http://gpu.lan:5000: refused.")
    watched.expect("#banner").to_contain_text("no answer from http://gpu.lan:5000")
    watched.expect(watched.page.get_by_role("heading", level=1)).to_have_text("Qwen/Qwen3-14B")
    gateway.error = None
    watched.expect("#banner").to_be_empty()
