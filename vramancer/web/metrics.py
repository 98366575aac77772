"""The separate listener for Prometheus (`VRM_METRICS_PORT`): the same metrics as `/metrics`, without a token."""

from __future__ import annotations

import asyncio
import socket
import threading

import uvicorn
from prometheus_client import CollectorRegistry, make_asgi_app

from core.errors import ConfigError
from vramancer.web.limits import Limits
from vramancer.web.listener import bind_socket
from vramancer.web.protocol import Config

LIMITS = Limits(
    max_connections=64,
    max_body_bytes=0,
    max_waiting=0,
    header_timeout_s=5.0,
    body_timeout_s=5.0,
    write_timeout_s=5.0,
    drain_timeout_s=0.0,
)


class MetricsServer:
    """Serves a registry over HTTP in a thread of its own. `port` 0 takes a free one; `port` then says which."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self._server = uvicorn.Server(Config(make_asgi_app(registry), LIMITS))
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen. Raises `ConfigError` when the address cannot be had."""
        try:
            listener = bind_socket(self.host, self.port)
            listener.listen(LIMITS.max_connections)
        except (ConfigError, OSError) as error:
            raise ConfigError(
                f"api.metrics_port (VRM_METRICS_PORT): cannot listen on {self.host}:{self.port}. "
                "Choose another port, or 0 for no metrics listener."
            ) from error
        self.port = listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run, args=(listener,), name="metrics")
        self._thread.start()

    def _run(self, listener: socket.socket) -> None:
        asyncio.run(self._server.serve([listener]))

    def stop(self) -> None:
        """Close the listener and end its thread. Safe to call twice."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()
            self._thread = None
