"""The separate listener for Prometheus (`VRM_METRICS_PORT`): the same metrics as `/metrics`, without a token."""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
from collections.abc import Sequence

import uvicorn
from prometheus_client import CollectorRegistry, make_asgi_app

from core.errors import ConfigError, PortInUseError
from vramancer.web.limits import Limits
from vramancer.web.listener import bind_address
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
    """Serves a registry over HTTP in a thread of its own, at `port` or the first of `others` that is free. 0 takes any
    free one. `port` then says which."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int, others: Sequence[int] = ()) -> None:
        self.host = host
        self.port = port
        self._ports = (port, *others)
        self._server = uvicorn.Server(Config(make_asgi_app(registry), LIMITS))
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen. Raises `ConfigError` when the address cannot be had, `PortInUseError` if all ports are taken."""
        listener = self._listen()
        self.port = listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run, args=(listener,), name="metrics")
        self._thread.start()

    def _listen(self) -> socket.socket:
        for port in self._ports:
            listener = None
            try:
                listener = bind_address(self.host, port)
                listener.listen(LIMITS.max_connections)
            except OSError as error:
                if listener is not None:
                    listener.close()
                if error.errno != errno.EADDRINUSE:
                    raise ConfigError(self._refusal(f"cannot be had: {error.strerror}")) from error
            else:
                return listener
        raise PortInUseError(self._refusal("is in use by another program"))

    def _refusal(self, why: str) -> str:
        return (
            f"api.metrics_port: {self.host}:{self.port} {why}; choose another with --metrics-port (VRM_METRICS_PORT), "
            "or 0 for no metrics listener."
        )

    def _run(self, listener: socket.socket) -> None:
        asyncio.run(self._server.serve([listener]))

    def stop(self) -> None:
        """Close the listener and end its thread. Safe to call twice."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()
            self._thread = None
