"""The separate listener for Prometheus (`VRM_METRICS_PORT`): the same metrics as `/metrics`, without a token."""

from __future__ import annotations

import threading
from wsgiref.simple_server import WSGIServer

from prometheus_client import start_http_server

from core.errors import ConfigError
from core.metrics.registry import MetricsRegistry


class MetricsServer:
    """Serves a registry over HTTP in a thread of its own. `port` 0 takes a free one; `port` then says which."""

    def __init__(self, metrics: MetricsRegistry, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self._metrics = metrics
        self._server: WSGIServer | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen. Raises `ConfigError` when the address cannot be had."""
        try:
            self._server, self._thread = start_http_server(self.port, self.host, self._metrics.registry)
        except OSError as error:
            raise ConfigError(
                f"api.metrics_port (VRM_METRICS_PORT): cannot listen on {self.host}:{self.port}: {error.strerror}. "
                "Choose another port, or 0 for no metrics listener."
            ) from error
        self.port = self._server.server_port

    def stop(self) -> None:
        """Close the listener and end its thread. Safe to call twice."""
        if self._server is None or self._thread is None:
            return
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._server = self._thread = None
