"""The real server in a process of its own, as users start it."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.worker import WorkerError

HOST = "127.0.0.1"
START_TIMEOUT_S = 300.0


@dataclass
class Server:
    """A running server: where it listens, how to be let in, and its process."""

    port: int
    token: str
    process: subprocess.Popen[bytes]

    def get(self, path: str) -> Any:
        """The JSON answer to a GET request."""
        request = urllib.request.Request(
            f"http://{HOST}:{self.port}{path}", headers={"Authorization": f"Bearer {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    @functools.cached_property
    def model(self) -> str:
        """The name under which it serves its model."""
        name: str = self.get("/v1/models")["data"][0]["id"]
        return name


def free_port() -> int:
    """A loopback port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(server: Server, log_path: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            tail = "\n".join(log_path.read_text(errors="replace").splitlines()[-20:])
            raise WorkerError(f"the server ended with status {server.process.returncode}:\n{tail}")
        try:
            server.get("/ready")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)  # not listening yet, or 503 while the model loads
        else:
            return
    raise WorkerError(f"the server was not ready after {START_TIMEOUT_S:.0f} s; its log is {log_path}")


@contextlib.contextmanager
def running_server(settings: Mapping[str, str], log_path: Path) -> Iterator[Server]:
    """Start the server with environment variables, wait until it is ready, and stop it afterwards."""
    token, port = secrets.token_urlsafe(32), free_port()
    own = {"VRM_API_TOKEN": token, "VRM_API_PORT": str(port), "VRM_METRICS_PORT": "0", "VRM_DISABLE_RATE_LIMIT": "1"}
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "vramancer.main", "--api"],
            env={**os.environ, **own, **settings},
            stdout=log,
            stderr=log,
        )
    try:
        server = Server(port, token, process)
        _wait_until_ready(server, log_path)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
