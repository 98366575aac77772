"""A live server: `python -m vramancer.main --api` with the demo model on two logical devices, on a free port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from plain_settings import CACHE_DIR

TOKEN = "a-token-for-tests-only"


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, token: str = TOKEN) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=token, max_retries=0, timeout=120)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start_server(directory: Path, *flags: str, **environment: str) -> Server:
    """Start a server and wait until it is ready."""
    port, log = free_port(), directory / "server.log"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("VRM_", "XDG_"))}
    environ = {
        **inherited, "VRM_API_TOKEN": TOKEN, "XDG_CONFIG_HOME": str(directory), "XDG_STATE_HOME": str(directory),
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VRM_RUNTIME_CACHE_DIR": str(CACHE_DIR), **environment,
    }  # fmt: skip
    command = [
        sys.executable, "-m", "vramancer.main", "--api", "--port", str(port), "--metrics-port", str(free_port()),
        *flags,
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environ)
    server = Server(process, port, log)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{server.url}/ready", timeout=5):
                return server
        except (urllib.error.URLError, OSError):
            if process.poll() is not None:
                break
            time.sleep(0.1)
    stop_server(server)
    raise AssertionError(f"the server did not start:\n{log.read_text()}")


def stop_server(server: Server) -> int:
    """Ctrl-C, then wait. Returns the exit status."""
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGINT)
        try:
            server.process.wait(120)
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.wait()
    return server.process.returncode


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = start_server(
        tmp_path_factory.mktemp("server"), "--devices", "cpu=256MiB,cpu=128MiB", "--served-model-name", "demo,tiny",
        "--placement", "vram", "--profile-seconds", "0.1",
    )  # fmt: skip
    yield started
    status = stop_server(started)
    assert status == 0, started.log.read_text()[-3000:]


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as opened:
        yield opened
