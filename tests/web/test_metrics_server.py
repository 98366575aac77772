"""The listener for Prometheus."""

from __future__ import annotations

import socket
import threading
import urllib.request
from collections.abc import Iterator

import pytest

from core.errors import ConfigError
from core.metrics import MetricsRegistry
from vramancer.web.metrics import LIMITS, MetricsServer


@pytest.fixture
def metrics() -> MetricsRegistry:
    return MetricsRegistry()


@pytest.fixture
def server(metrics: MetricsRegistry) -> Iterator[MetricsServer]:
    server = MetricsServer(metrics.registry, "127.0.0.1", 0)
    server.start()
    yield server
    server.stop()


def fetch(server: MetricsServer) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=60) as response:
        text: str = response.read().decode()
        return text


def test_listener_serves_the_registry(metrics: MetricsRegistry, server: MetricsServer) -> None:
    metrics.count_environment_hit()
    assert "vramancer_env_endpoint_hits_total 1.0" in fetch(server)


def test_listener_ends_with_its_thread(metrics: MetricsRegistry) -> None:
    before = threading.active_count()
    server = MetricsServer(metrics.registry, "127.0.0.1", 0)
    server.start()
    fetch(server)
    server.stop()
    server.stop()
    assert threading.active_count() == before
    with pytest.raises(OSError, match="refused"):
        fetch(server)


def test_a_port_that_is_taken_names_the_setting(metrics: MetricsRegistry, server: MetricsServer) -> None:
    with pytest.raises(ConfigError, match="VRM_METRICS_PORT"):
        MetricsServer(metrics.registry, "127.0.0.1", server.port).start()


def test_the_first_of_other_ports_that_is_free_is_taken(metrics: MetricsRegistry, server: MetricsServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as second, socket.create_server(("127.0.0.1", 0)) as third:
        taken, free = second.getsockname()[1], third.getsockname()[1]
        third.close()
        other = MetricsServer(metrics.registry, "127.0.0.1", server.port, (taken, free))
        other.start()
        try:
            assert other.port == free
            assert "vramancer" in fetch(other)
        finally:
            other.stop()


def test_connections_that_say_nothing_leave_room(metrics: MetricsRegistry, server: MetricsServer) -> None:
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2 * LIMITS.max_connections)]
    try:
        assert "vramancer_" in fetch(server)
    finally:
        for connection in silent:
            connection.close()
