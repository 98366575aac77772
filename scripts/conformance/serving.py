"""Our server with its bundled models, on a free port of the loopback interface, for as long as a run takes."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

HOST = "127.0.0.1"
TEMPLATE = Path(__file__).resolve().parent / "demo_with_tools.jinja"
"""The demo model's own has no place for tools, and would have all requests with tools refused."""
START_S = 600.0
STOP_S = 60.0
MODEL, EMBEDDING_MODEL = "vramancer-demo", "vramancer-demo-embedding"


class Server(NamedTuple):
    """Where it is, and what opens it."""

    port: int
    token: str
    log: Path

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON of an answer. Raises `urllib.error.HTTPError` for an error."""
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def faults(self) -> list[str]:
        """Lines of its log that tell of a fault of its own."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line for line in lines if "unexpectedly" in line or "Traceback" in line]


@contextmanager
def serving(python: str, folder: Path, settings: Mapping[str, str]) -> Iterator[Server]:
    """Started by the given Python from the current directory. Raises `RuntimeError` if it does not come up."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    server = Server(port, secrets.token_urlsafe(32), folder / "server.log")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VRM_")}
    environment |= {
        "VRM_API_TOKEN": server.token, "VRM_API_PORT": str(port), "VRM_METRICS_PORT": "0",
        "VRM_DISABLE_RATE_LIMIT": "1", "VRM_RUNTIME_STATE_DIR": str(folder), "VRM_TEST_MODE": "1",
        "VRM_MODEL_CHAT_TEMPLATE": str(TEMPLATE), "VRM_MODEL_TOOL_PARSER": "hermes", **settings,
    }  # fmt: skip
    with server.log.open("wb") as log:
        process = subprocess.Popen(
            [python, "-m", "vramancer.main", "--api"], env=environment, stdout=log, stderr=log
        )  # fmt: skip
    try:
        _wait(server, process)
        yield server
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}: {server.log.read_text()[-2000:]}")
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(server: Server, process: subprocess.Popen[bytes]) -> None:
    until_s = time.monotonic() + START_S
    while time.monotonic() < until_s and process.poll() is None:
        try:
            server.ask("GET", "/ready")
        except (OSError, urllib.error.HTTPError):
            time.sleep(0.5)
        else:
            return
    raise RuntimeError(f"the server did not start: {server.log.read_text(errors='replace')[-2000:]}")


def run(command: Sequence[str], **environment: str) -> int:
    """A command, with its output shown. Returns its status."""
    print("+", *command, flush=True)
    return subprocess.run(command, env={**os.environ, **environment}, check=False).returncode


def own_python() -> str:
    """Of the environment that the project is installed in, which need not be the one that runs this."""
    return os.environ.get("CONFORMANCE_PYTHON", sys.executable)
