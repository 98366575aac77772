"""The real Prometheus and Alertmanager on free loopback ports, something for them to scrape, and somebody to tell."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml
from e2e.conftest import free_port
from monitoring_files import ALERTMANAGER, MONITORING, program, run

LONGEST_WAIT_S = 300.0
"""What never takes that long is broken; no test waits for it otherwise."""
INTERVAL_S = 2
SHORTER = {"2m": "20s", "5m": "30s", "10m": "40s"}
"""Windows of rules, for tests: several intervals, so that a slow machine that misses some alerts nobody."""


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for the condition; fails if it does not come true."""
    deadline_s = time.monotonic() + LONGEST_WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"in vain: {what}"
        time.sleep(0.1)


def shortened(text: str) -> str:
    """Rules whose windows are short and whose alerts hardly wait. Names that mention a window stay."""
    text = re.sub(r"\[(\w+)\]", lambda found: f"[{SHORTER[found[1]]}]", text)
    return re.sub(r"for: \d+[ms]\n", f"for: {2 * INTERVAL_S}s\n", text)


def with_webhook(text: str, url: str) -> str:
    """Alertmanager's configuration with the example of a receiver taken in, and its address replaced."""
    taken_in = re.sub(r"^    # ", "    ", text, flags=re.MULTILINE)
    return taken_in.replace("http://127.0.0.1:9094/alerts", url)


def impatient(text: str) -> str:
    """Alertmanager's configuration without its waits."""
    return re.sub(r"(group_wait|group_interval): \w+", r"\1: 1s", text)


def get_json(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return json.load(answer)


@dataclass
class Program:
    """A process that answers on a port."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def _running(name: str, ready: str, log: Path, *flags: str) -> Iterator[Program]:
    """A program that listens on a free port; it has ended afterwards."""
    port = free_port()
    command = [program(name), *flags, f"--web.listen-address=127.0.0.1:{port}"]
    with log.open("wb") as output:
        started = Program(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=log.parent), port, log)
    try:
        until(lambda: _answers(started, ready), f"{name} answers")
        yield started
    finally:
        started.process.terminate()
        try:
            started.process.wait(60)
        except subprocess.TimeoutExpired:
            started.process.kill()
            started.process.wait()


def _answers(started: Program, path: str) -> bool:
    assert started.process.poll() is None, started.log.read_text()
    try:
        with urllib.request.urlopen(started.url + path, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


class Prometheus:
    """A Prometheus that is running, asked over HTTP."""

    def __init__(self, running: Program) -> None:
        self.url = running.url

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples of an instant query."""
        found: list[dict[str, Any]] = self._get("query", query=expression)["result"]
        return found

    def names(self) -> set[str]:
        """Of all series that were scraped or recorded."""
        return set(get_json(f"{self.url}/api/v1/label/__name__/values")["data"])

    def unhealthy_rules(self) -> list[str]:
        """Rules whose last evaluation failed, and why."""
        groups = self._get("rules")["groups"]
        every = [rule for group in groups for rule in group["rules"]]
        return [f"{rule['name']}: {rule.get('lastError')}" for rule in every if rule["health"] == "err"]

    def firing(self) -> set[tuple[str, str]]:
        """Servers and alerts."""
        alerts = self._get("alerts")["alerts"]
        return {
            (alert["labels"]["instance"], alert["labels"]["alertname"])
            for alert in alerts
            if alert["state"] == "firing"
        }

    def _get(self, path: str, **parameters: str) -> Any:
        return get_json(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}")["data"]


@contextmanager
def prometheus(directory: Path, targets: list[dict[str, Any]], alertmanager: str | None = None) -> Iterator[Prometheus]:
    """The configuration of `monitoring/` with shortened rules and a short interval. `targets` as in file discovery;
    `alertmanager` is the host and port of one."""
    home = directory / "prometheus"
    shutil.copytree(MONITORING / "prometheus", home)
    for file in (home / "rules").glob("*.yml"):
        file.write_text(shortened(file.read_text(encoding="utf-8")), encoding="utf-8")
    config = (home / "prometheus.yml").read_text(encoding="utf-8")
    (home / "prometheus.yml").write_text(
        re.sub(r"(_interval|_timeout): \d+s", rf"\1: {INTERVAL_S}s", config), encoding="utf-8"
    )
    (home / "targets" / "vramancer.yml").write_text(yaml.safe_dump(targets), encoding="utf-8")
    others = [] if alertmanager is None else [{"targets": [alertmanager]}]
    (home / "targets" / "alertmanager.yml").write_text(yaml.safe_dump(others), encoding="utf-8")
    flags = (f"--config.file={home / 'prometheus.yml'}", f"--storage.tsdb.path={directory / 'data'}")
    with _running("prometheus", "/-/ready", directory / "prometheus.log", *flags) as running:
        yield Prometheus(running)


@contextmanager
def alertmanager(directory: Path, webhook_url: str) -> Iterator[Program]:
    """The configuration of `monitoring/` with its example of a receiver, and without waiting."""
    config = directory / "alertmanager.yml"
    text = impatient(with_webhook(ALERTMANAGER.read_text(encoding="utf-8"), webhook_url))
    config.write_text(text, encoding="utf-8")
    checked = run("amtool", "check-config", config)
    assert checked.returncode == 0, checked.stderr
    flags = (f"--config.file={config}", f"--storage.path={directory / 'alertmanager'}", "--cluster.listen-address=")
    with _running("alertmanager", "/-/ready", directory / "alertmanager.log", *flags) as running:
        yield running


@dataclass
class Webhook:
    """What Alertmanager told: one entry for each alert of each message."""

    url: str = ""
    told: list[dict[str, Any]] = field(default_factory=list)

    def alerts(self, status: str = "firing") -> set[tuple[str, str]]:
        """Servers and alerts that were told of so far."""
        labels = [alert["labels"] for alert in list(self.told) if alert["status"] == status]
        return {(label["instance"], label["alertname"]) for label in labels}


@contextmanager
def webhook() -> Iterator[Webhook]:
    """Somebody who is told of alerts."""
    heard = Webhook()

    class Handler(_Quiet):
        def do_POST(self) -> None:
            message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            heard.told += [{**alert, "receiver": message["receiver"]} for alert in message["alerts"]]
            self.answer(200, b"")

    with _serving(Handler) as port:
        heard.url = f"http://127.0.0.1:{port}/alerts"
        yield heard


Page = Callable[[int], str]
"""The metrics of a node at its n-th scrape."""


@contextmanager
def exporter(pages: dict[str, Page]) -> Iterator[int]:
    """Nodes that show what they are told to, each under the path of its name. A page of "" is answered 500."""
    scrapes = dict.fromkeys(pages, 0)

    class Handler(_Quiet):
        def do_GET(self) -> None:
            name = self.path.strip("/")
            scrapes[name] += 1
            text = pages[name](scrapes[name])
            self.answer(200 if text else 500, text.encode())

    with _serving(Handler) as port:
        yield port


class _Quiet(BaseHTTPRequestHandler):
    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def _serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, name="scraped or told")
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()
