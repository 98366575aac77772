"""More clients than the limits allow, and clients that stall: all are answered, none is reset. The benchmark
`benchmarks.front_door` in small, with its own clients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from e2e.conftest import TOKEN, start_server, stop_server

from benchmarks.front_door import Crowd, bad_company, crowd_of_streams, live_ms
from benchmarks.server import Server


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that takes four streams at a time and lets four wait."""
    started = start_server(
        tmp_path_factory.mktemp("crowds"),
        *("--max-batch-size", "4", "--max-queue", "4", "--max-connections", "400"),
        VRM_MINIMAL_TEST="1",
    )
    yield Server(started.port, TOKEN, started.process)
    assert stop_server(started) == 0


def test_every_stream_of_a_crowd_is_answered_or_told_to_come_back(small: Server) -> None:
    became = crowd_of_streams(small, 100)
    assert set(became) == {"done", "429 with Retry-After"}
    assert became["done"] >= 8


def test_in_bad_company_everybody_else_is_served(small: Server) -> None:
    with bad_company(small, Crowd(half_heads=150, half_bodies=50, never_reading=6, streams=0)):
        assert live_ms(small.port) > 0
        assert crowd_of_streams(small, 4) == {"done": 4}
        assert small.get("/api/queue/status")["unfinished"] == 0
