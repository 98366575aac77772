"""A master and a worker as users start them, with the README's commands, on loopback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from steering import until

REPOSITORY = Path(__file__).parents[2]
ON_LOOPBACK = ("--cluster-interface", "127.0.0.1")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


class Program:
    """A process of ours, and what it has printed."""

    def __init__(self, home: Path, *flags: str, **variables: str) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("VRM_", "XDG_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vramancer.main", *flags],
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


class Pair:
    """Starts masters and workers, each at home in a folder of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.running: list[Program] = []

    def master(self, *flags: str, **variables: str) -> Program:
        ports = ("--port", "0", "--metrics-port", "0", "--cluster-port", "0")
        self.running.append(
            Program(self.home / "master", "--api", "--cluster-master", *ON_LOOPBACK, *ports, *flags, **variables)
        )
        return self.running[-1]

    def worker(self, at: str, token: str, *flags: str) -> Program:
        variables = {"VRM_CLUSTER_MASTER": at, "VRM_CLUSTER_TOKEN": token}
        more = ("--cluster-name", "attic", "--cluster-worker-port", "0")
        self.running.append(Program(self.home / "attic", "--cluster-worker", *ON_LOOPBACK, *more, *flags, **variables))
        return self.running[-1]

    @property
    def token(self) -> str:
        return (self.home / "master/.local/state/vramancer/cluster-token").read_text().strip()

    def ask(self, url: str, path: str, body: dict[str, Any] | None = None, status: int = 200) -> Any:
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


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    for name in ("master", "attic"):
        (tmp_path / name).mkdir()
    made = Pair(tmp_path)
    yield made
    for each in reversed(made.running):
        each.close()


def answer(pair: Pair, url: str) -> str:
    body = {"model": "vramancer-demo", "prompt": "Once upon a time", "max_tokens": 24, "temperature": 0}
    text: str = pair.ask(url, "/v1/completions", body)["choices"][0]["text"]
    return text


def homes(pair: Pair, url: str) -> list[str]:
    return [stage["device"] for stage in pair.ask(url, "/api/pipeline/status")["stages"]]


def test_two_machines_serve_one_model_and_one_of_them_leaves(pair: Pair) -> None:
    master = pair.master("--devices", "cpu=1GiB")
    url = master.says(r"API +(http://127\.0\.0\.1:\d+)/v1")[1]
    at = master.says(r"workers are accepted at\s+(127\.0\.0\.1:\d+)")[1]
    command = master.says(r"VRM_CLUSTER_TOKEN=(\S+) (.*)python -m vramancer.main --cluster-worker")
    assert command[1] == pair.token, "it is shown once"
    before = answer(pair, url)
    worker = pair.worker(url.removeprefix("http://"), pair.token)  # the API says where its master is
    worker.says("joined")
    until(lambda: len(pair.ask(url, "/api/nodes")["nodes"]) == 2, "both")
    seen = pair.ask(url, "/api/nodes")
    assert [node["hostname"] for node in seen["nodes"]][1:] == ["attic"]
    assert f"{seen['discovery']['address']}:{seen['discovery']['port']}" == at
    moved = pair.ask(
        url, "/api/pipeline/place", {"devices": "cpu=1GiB,attic/cpu#0,attic/cpu#1", "placement": "balanced"}
    )
    assert [stage["device"] for stage in moved["stages"]] == ["cpu", "attic/cpu#0", "attic/cpu#1"]
    assert answer(pair, url) == before
    for path in ("/api/gpu", "/api/memory", "/api/system", "/api/queue/status", "/api/batcher/stats", "/api/tasks"):
        assert pair.ask(url, path), path
    assert pair.ask(url, "/health")["status"] == "ok"

    worker.process.send_signal(signal.SIGINT)
    assert worker.process.wait() == 0, worker.said
    worker.says("leaving: the layers here move to other devices first")
    assert homes(pair, url) == ["cpu"]
    assert answer(pair, url) == before
    master.process.send_signal(signal.SIGTERM)
    assert master.process.wait() == 0
    assert "Traceback" not in master.said + worker.said
    assert pair.token not in worker.said


def test_a_model_that_needs_a_machine_waits_for_it(pair: Pair) -> None:
    master = pair.master("--devices", "attic/cpu#0")
    master.says("waiting for machines: attic/cpu#0 is not in the cluster")
    token = master.says(r"VRM_CLUSTER_TOKEN=(\S+) ")[1]
    # the port is in the log, since there is no banner yet
    at = master.says(r"taking workers in .*address=(127\.0\.0\.1:\d+)")[1]
    pair.worker(at, token)
    url = master.says(r"API +(http://127\.0\.0\.1:\d+)/v1")[1]
    assert homes(pair, url) == ["attic/cpu#0"]
    assert answer(pair, url)


def test_a_wrong_token_is_said_and_ends_the_worker(pair: Pair) -> None:
    master = pair.master("--devices", "cpu=1GiB")
    at = master.says(r"workers are accepted at\s+(127\.0\.0\.1:\d+)")[1]
    worker = pair.worker(at, "not the token of this cluster".replace(" ", "-"))
    assert worker.process.wait() == 1
    worker.says(r"error: .*token")
    url = master.says(r"API +(http://127\.0\.0\.1:\d+)/v1")[1]
    assert len(pair.ask(url, "/api/nodes")["nodes"]) == 1


def test_two_ctrl_c_leave_at_once(pair: Pair) -> None:
    master = pair.master("--devices", "attic/cpu#0")
    at = master.says(r"taking workers in .*address=(127\.0\.0\.1:\d+)")[1]
    worker = pair.worker(at, pair.token)
    master.says("is ready")
    worker.process.send_signal(signal.SIGINT)
    worker.says("once more to leave at once")
    master.says("a node cannot leave yet")
    worker.process.send_signal(signal.SIGINT)
    assert worker.process.wait() == 130
    master.says("requests wait for devices")
    url = master.says(r"API +(http://127\.0\.0\.1:\d+)/v1")[1]
    assert "attic/cpu#0" in json.dumps(pair.ask(url, "/health", status=503)), "it names what is missing"
