"""Requests that are wrong in every way, sent to the real server: none of them may end, stall or leak anything.

    python -m benchmarks.fuzz --requests 20000 --seed 0

The server (``python -m vramancer.main --api``) runs the demo model on two devices and a small queue. Clients send
seeded random requests over all its routes (`benchmarks.hostile`), and it is told to load damaged and hostile
checkpoints meanwhile. Reported: answers by status. The run fails on an answer of 5xx other than 503, on one that is not
in OpenAI's shape, on a request that gets none, on a server that has ended or answers nobody, and on threads, files,
blocks, sequences or leases that are left once it is idle again.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.hostile import Requests, Sent, hostile_models
from core.models.resolve import DEMO_PATH

HOST = "127.0.0.1"
START_S = 300.0
ANSWER_S = 90.0
"""A request without an answer for so long counts as stalled."""
IDLE_S = 90.0
GREETING = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
ANTHROPIC_PATHS = frozenset({"/v1/messages", "/v1/messages/count_tokens"})
OLLAMA_PATHS = frozenset({"/api/chat", "/api/embed", "/api/tags", "/api/show", "/api/ps", "/api/version"})
"""Whose errors have another shape than OpenAI's."""
UNROUTED = ("This is not a valid HTTP request.", "The path and query of a request", "The headers of a request")
"""Errors from before there is a route; they have OpenAI's shape."""
SLACK = {"threads": 12, "files": 12}
"""A pool that had a free thread by chance before; a connection that is closing."""


@dataclass
class Findings:
    """What came back. `failures` are what must not be; the first of each sort are shown."""

    statuses: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, status: str) -> None:
        with self.lock:
            self.statuses[status] += 1

    def fail(self, what: str) -> None:
        with self.lock:
            self.failures.append(what)


class Server:
    """The process, and how to reach it."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            self.port: int = probe.getsockname()[1]
        self.token = secrets.token_urlsafe(32)
        self.log = folder / "server.log"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("VRM_")}
        settings = {
            "API_TOKEN": self.token, "API_PORT": str(self.port), "METRICS_PORT": "0",
            "DEVICES_DEVICES": "cpu=1GiB,cpu=1GiB", "DEVICES_PLACEMENT": "vram",
            "ENGINE_MAX_QUEUE": "64", "ENGINE_MAX_BATCH_SIZE": "16",
            "ENGINE_KV_CACHE_TOKENS": "8192", "API_BODY_TIMEOUT_S": "5", "API_HEADER_TIMEOUT_S": "5",
            "SECURITY_REQUESTS_PER_MINUTE": "1000000", "RUNTIME_STATE_DIR": str(folder),
        }  # fmt: skip
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vramancer.main", "--api"],
                env=environment | {f"VRM_{name}": value for name, value in settings.items()},
                stdout=log,
                stderr=log,
            )

    def ask(self, method: str, path: str, body: Any = None, timeout_s: float = ANSWER_S) -> tuple[int, Any]:
        """Status and JSON of a well-formed request."""
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        connection = http.client.HTTPConnection(HOST, self.port, timeout=timeout_s)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read() or b"null")
        finally:
            connection.close()

    def wait_until_ready(self) -> None:
        """Raises `RuntimeError` if it does not come up."""
        deadline_s = time.monotonic() + START_S
        while time.monotonic() < deadline_s and self.process.poll() is None:
            with contextlib.suppress(OSError):
                if self.ask("GET", "/ready")[0] == 200:
                    return
            time.sleep(0.2)
        raise RuntimeError(f"the server did not start; its log is {self.log}")

    def state(self) -> dict[str, Any]:
        """What must go back to where it was, of the process and of the engine."""
        process = psutil.Process(self.process.pid)
        queue, batch, memory = (
            self.ask("GET", f"/api/{what}")[1] for what in ("queue/status", "batcher/stats", "memory")
        )
        blocks = batch["kv_blocks"]
        return {
            "threads": process.num_threads(),
            "files": process.num_fds(),
            "resident": process.memory_info().rss,
            "requests": queue["unfinished"],
            "sequences": queue["unfinished_sequences"] + queue["running"] + queue["waiting"],
            "blocks": blocks["total"] - blocks["free"],
            "leases": len(memory["leases"]),
        }

    def settle(self) -> dict[str, Any]:
        """Wait until nothing is under way, then its state."""
        deadline_s = time.monotonic() + IDLE_S
        state = self.state()
        while (state["requests"] or state["sequences"] or state["blocks"]) and time.monotonic() < deadline_s:
            time.sleep(0.5)
            state = self.state()
        time.sleep(6.0)  # connections that wait for the rest of something are closed by then
        return self.state()

    def load(self, model: Path | str) -> int:
        """Returns the status of the answer."""
        return self.ask("POST", "/api/models/load", {"model": str(model)}, timeout_s=ANSWER_S)[0]

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def routes() -> list[tuple[str, str]]:
    """Method and rule of everything that the application answers, but for what takes its model away."""
    from core.api import create_app
    from core.config import load_settings
    from core.inference_pipeline import InferencePipeline

    pipeline = InferencePipeline(load_settings(environ={"XDG_CONFIG_HOME": os.devnull}))
    try:
        rules = create_app(pipeline, token="unused").url_map.iter_rules()
        found = [(method, rule.rule) for rule in rules for method in sorted(rule.methods or ())]
    finally:
        pipeline.shutdown()
    return [route for route in found if route[1] not in ("/api/models/unload", "/api/models/load")]


def send(server: Server, sent: Sent, findings: Findings, name: str) -> None:
    """One request and its answer."""
    if sent.raw is not None:
        findings.count(_send_raw(server, sent.raw))
        return
    connection = http.client.HTTPConnection(HOST, server.port, timeout=ANSWER_S)
    try:
        connection.request(sent.method, sent.path, sent.body, sent.headers)
        if sent.leaves_s is not None:
            time.sleep(sent.leaves_s)
            findings.count("left")
            return
        answer = connection.getresponse()
        data = answer.read()
    except (ValueError, http.client.InvalidURL):
        findings.count("not sendable")
        return
    except (BrokenPipeError, ConnectionResetError):
        findings.count("closed")  # while the body was still being sent: it had been refused
        if len(sent.body or b"") < 100_000:
            findings.fail(f"{name}: the connection was closed without an answer: {_shown(sent)}")
        return
    except (TimeoutError, http.client.HTTPException) as error:
        findings.count(type(error).__name__)
        findings.fail(f"{name}: {error!r}: {_shown(sent)}")
        return
    finally:
        connection.close()
    findings.count(str(answer.status))
    trouble = trouble_of(sent, answer.status, answer.headers.get("Content-Type") or "", data)
    if trouble is not None:
        findings.fail(f"{name}: {trouble}: {_shown(sent)}")


def trouble_of(sent: Sent, status: int, kind: str, data: bytes) -> str | None:
    """What is wrong with an answer."""
    if status >= 500 and status != 503:
        return f"{status} {data[:300]!r}"
    if status >= 400 and sent.method != "HEAD" and sent.path != "/ready" and not sent.path.startswith("/health"):
        path = sent.path.partition("?")[0]
        try:
            error = json.loads(data)["error"]
            if path in OLLAMA_PATHS and not (isinstance(error, dict) and error["message"].startswith(UNROUTED)):
                return None if isinstance(error, str) else f"{status} is no error of Ollama's shape: {data[:300]!r}"
            missing = ({"message", "type"} if path in ANTHROPIC_PATHS else {"message", "type", "param", "code"}) - set(
                error
            )
        except (ValueError, KeyError, TypeError):
            return f"{status} is no error of the API's shape: {data[:300]!r}"
        if missing:
            return f"{status} has no {missing}"
    if "event-stream" in kind and b"[DONE]" not in data[-100:] and b'"error"' not in data:
        return f"a stream that ends in the middle: {data[-200:]!r}"
    return None


def _send_raw(server: Server, raw: bytes) -> str:
    with socket.create_connection((HOST, server.port), timeout=ANSWER_S) as connection:
        try:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            head = connection.recv(4096)
        except (BrokenPipeError, ConnectionResetError, OSError):
            return "closed"
    return head[9:12].decode("latin-1") if head.startswith(b"HTTP/") else "closed"


def _shown(sent: Sent) -> str:
    return f"{sent.kind}: {sent.method} {sent.path[:80]} {(sent.body or b'')[:300]!r} {len(sent.body or b'')} bytes"


def fuzz(
    server: Server, requests: Requests, numbers: range, clients: int, models: Iterator[Path], findings: Findings
) -> None:
    """Send the requests with these numbers. Meanwhile one hostile model after the other is loaded."""
    waiting, done = iter(numbers), threading.Event()
    lock = threading.Lock()

    def client() -> None:
        while server.process.poll() is None:
            with lock:
                number = next(waiting, None)
            if number is None:
                return
            try:
                send(server, requests.number(number), findings, f"request {number}")
            except Exception as error:  # noqa: BLE001  a finding, whatever it is
                findings.fail(f"request {number}: {error!r}")

    def load() -> None:
        while not done.is_set() and server.process.poll() is None:
            model = next(models)
            try:
                status = server.load(model)
                findings.count(f"load: {status}")
                if status >= 500 and status != 503:
                    findings.fail(f"loading {model.name}: {status}")
                if status == 200:
                    done.wait(2.0)
                    status, body = server.ask("POST", "/v1/chat/completions", GREETING)
                    if status >= 500 and status != 503:
                        findings.fail(f"a chat with {model.name}: {status} {body}")
                    if server.load(DEMO_PATH) not in (200, 409, 503):
                        findings.fail("the demo model cannot be loaded again")
            except Exception as error:  # noqa: BLE001  a finding, whatever it is
                findings.fail(f"loading {model.name}: {error!r}")
            done.wait(1.0)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    loader = threading.Thread(target=load)
    for thread in (*threads, loader):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    loader.join()


def check(before: dict[str, Any], after: dict[str, Any], findings: Findings) -> None:
    """Fail for what is left."""
    for name in ("requests", "sequences", "blocks", "leases"):
        if after[name]:
            findings.fail(f"{after[name]} {name} are left")
    for name, slack in SLACK.items():
        if after[name] > before[name] + slack:
            findings.fail(f"{name}: {before[name]} before, {after[name]} after")


def greet(server: Server) -> Any:
    """What the demo model says."""
    status = 0
    for _ in range(20):  # it may have to be loaded again, or a breaker be closed
        status = server.load(DEMO_PATH)
        if status == 200:
            break
        time.sleep(1.0)
    status, body = server.ask("POST", "/v1/chat/completions", GREETING)
    return body["choices"][0]["message"]["content"] if status == 200 else f"{status} {body}"


def run(options: argparse.Namespace, folder: Path, console: Console) -> Findings:
    """The whole of it: a quarter of the requests to warm up, the state, the rest, and the state again."""
    findings, server = Findings(), Server(folder)
    models = itertools.cycle(hostile_models(folder / "models"))
    try:
        server.wait_until_ready()
        requests, text = Requests(options.seed, server.token, routes()), greet(server)
        quarter = options.first + options.requests // 4
        began_s = time.monotonic()
        fuzz(server, requests, range(options.first, quarter), options.clients, models, findings)
        greet(server)
        before = server.settle()
        fuzz(server, requests, range(quarter, options.first + options.requests), options.clients, models, findings)
        took_s = time.monotonic() - began_s
        greet(server)
        after = server.settle()
        check(before, after, findings)
        if (found := greet(server)) != text:
            findings.fail(f"the model says {found!r}, and said {text!r}")
        console.print(f"{options.requests} requests in {took_s:.0f} s; before {before}, after {after}")
    except Exception as error:  # noqa: BLE001  a server that answers nobody is a finding, too
        findings.fail(f"the server does not answer: {error!r}")
    finally:
        if server.process.poll() is not None:
            findings.fail(f"the server has ended with status {server.process.returncode}")
        server.stop()
        log = server.log.read_text(errors="replace")
        findings.count("unexpected, in the log") if "failed unexpectedly" in log else None
        if findings.failures and options.keep_log:
            options.keep_log.write_text(log)
    return findings


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzz",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--requests", type=int, default=20_000, help="how many to send")
    parser.add_argument("--seed", type=int, default=0, help="what they follow from")
    parser.add_argument("--first", type=int, default=0, help="number of the first one, to repeat some of a run")
    parser.add_argument("--clients", type=int, default=12, help="how many are sent at a time")
    parser.add_argument("--keep-log", type=Path, help="where to put the server's log if something fails")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        findings = run(options, Path(folder), console)
    table = Table("answer", "requests")
    for status, count in sorted(findings.statuses.items()):
        table.add_row(status, str(count))
    console.print(table)
    for failure in findings.failures[:20]:
        print(f"error: {failure}", file=sys.stderr)
    print(f"{len(findings.failures)} failures")
    return 1 if findings.failures else 0


if __name__ == "__main__":
    sys.exit(main())
