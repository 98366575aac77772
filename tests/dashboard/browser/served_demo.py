"""A server process with the demo model on two logical devices and tiers below, and requests to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plain_settings import CACHE_DIR
from steering import LONGEST_WAIT_S

TOKEN = "a-token-for-tests-only"
START_S = 300.0
FLAGS = (
    "--devices", "cpu=32MiB,cpu=48MiB", "--placement", "vram", "--profile-seconds", "0.05", "--kv-cache-tokens", "2048",
    "--host-bytes", str(4 << 20), "--disk-min-free-bytes", "0",
)  # fmt: skip


class Demo:
    """At `url`."""

    def __init__(self, directory: Path, *flags: str) -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = directory / "server.log"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("VRM_", "XDG_"))}
        environ = {
            **inherited, "VRM_API_TOKEN": TOKEN, "HOME": str(directory), "XDG_CONFIG_HOME": str(directory),
            "XDG_STATE_HOME": str(directory), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
            "VRM_RUNTIME_CACHE_DIR": str(CACHE_DIR), "HF_HOME": str(directory / "hub"),
        }  # fmt: skip
        command = [
            sys.executable, "-m", "vramancer.main", "--api", "--port", str(self.port), "--metrics-port", "0",
            *FLAGS, "--disk-path", str(directory / "kv"), *flags,
        ]  # fmt: skip
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environ)

    def wait(self) -> None:
        deadline_s = time.monotonic() + START_S
        while time.monotonic() < deadline_s:
            try:
                with urllib.request.urlopen(f"{self.url}/ready", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                assert self._process.poll() is None, self._log.read_text()
                time.sleep(0.1)
        raise AssertionError(f"the server did not start:\n{self._log.read_text()}")

    def stop(self) -> None:
        """Ctrl-C, and its end."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(LONGEST_WAIT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        assert "Traceback" not in self._log.read_text(), self._log.read_text()[-4000:]

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        with urllib.request.urlopen(request, timeout=LONGEST_WAIT_S) as answer:
            return json.load(answer)

    def complete(self, prompt: str, max_tokens: int) -> Any:
        body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
        return self.ask("/v1/completions", body)

    @contextmanager
    def busy(self, streams: int = 2) -> Iterator[None]:
        """Requests run meanwhile, one after the other."""
        done = threading.Event()

        def work(number: int) -> None:
            turn = 0
            while not done.is_set():
                turn += 1
                self.complete(f"{number} and {turn} make a story. " * 4, 120)

        workers = [threading.Thread(target=work, args=(number,)) for number in range(streams)]
        for worker in workers:
            worker.start()
        try:
            yield
        finally:
            done.set()
            for worker in workers:
                worker.join(LONGEST_WAIT_S)

    def fill_tiers(self) -> None:
        """More prompts than the KV cache holds, so that blocks leave it."""
        for turn in range(40):
            self.complete(f"{turn} " + "once upon a time there was a card with little memory, and " * 6, 1)
            memory = self.ask("/api/memory?blocks=8")
            if memory["tiers"][0]["blocks"] >= 4:
                return
        raise AssertionError(f"no block has left the devices: {memory}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
