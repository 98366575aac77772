"""Masters and workers as users start them, each a process, at home in a folder of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from steering import until

REPOSITORY = Path(__file__).parents[2]
ON_LOOPBACK = ("--cluster-interface", "127.0.0.1")


class Program:
    """A process of ours, and what it has printed. `within` makes a command one that runs elsewhere."""

    def __init__(
        self, home: Path, *flags: str, within: Callable[..., Sequence[str]] = lambda *command: command, **variables: str
    ) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("VRM_", "XDG_"))}
        self.process = subprocess.Popen(
            within(sys.executable, "-m", "vramancer.main", *flags),
            env={**inherited, "HOME": str(home), "VRM_MINIMAL_TEST": "1", **variables},
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.said = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line

    def says(self, pattern: str) -> re.Match[str]:
        """Wait for it."""
        until(lambda: re.search(pattern, self.said) or self.process.poll() is not None, f"{pattern!r}: {self.said}")
        found = re.search(pattern, self.said)
        assert found is not None, self.said
        return found

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Programs:
    """A master and its workers."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.running: list[Program] = []

    def start(self, name: str, *flags: str, **given: Any) -> Program:
        """At home in a folder of this name."""
        (self.home / name).mkdir(exist_ok=True)
        self.running.append(Program(self.home / name, *flags, **given))
        return self.running[-1]

    def master(self, *flags: str, **variables: str) -> Program:
        ports = ("--port", "0", "--metrics-port", "0", "--cluster-port", "0")
        return self.start("master", "--api", "--cluster-master", *ON_LOOPBACK, *ports, *flags, **variables)

    def worker(self, at: str, token: str, *flags: str) -> Program:
        variables = {"VRM_CLUSTER_MASTER": at, "VRM_CLUSTER_TOKEN": token}
        more = ("--cluster-name", "attic", "--cluster-worker-port", "0")
        return self.start("attic", "--cluster-worker", *ON_LOOPBACK, *more, *flags, **variables)

    @property
    def token(self) -> str:
        return (self.home / "master/.local/state/vramancer/cluster-token").read_text().strip()

    def ask(self, url: str, path: str, body: dict[str, Any] | None = None, status: int = 200) -> Any:
        """Of the master's API."""
        token = (self.home / "master/.local/state/vramancer/api-token").read_text().strip()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(url + path, data, headers), timeout=300) as response:
                found, said = response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                found, said = error.code, error.read()
        assert found == status, f"{path}: {said.decode()}"
        return json.loads(said)

    def answer(self, url: str, max_tokens: int = 24) -> str:
        """Always the same."""
        body = {
            "model": "vramancer-demo", "prompt": "Once upon a time", "max_tokens": max_tokens, "temperature": 0,
            "ignore_eos": True,
        }  # fmt: skip
        text: str = self.ask(url, "/v1/completions", body)["choices"][0]["text"]
        return text

    def homes(self, url: str) -> list[str]:
        """The devices that have layers."""
        return [stage["device"] for stage in self.ask(url, "/api/pipeline/status")["stages"]]

    def close(self) -> None:
        for each in reversed(self.running):
            each.close()
