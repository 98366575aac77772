"""What watching costs: a server that is scraped, traced and looked at beside one that is left alone.

    python -m benchmarks.observing [--pairs 20] [--viewers 50]

Two servers with the same weights take turns. One reads its devices once an hour and nobody asks it anything. The other
reads them every second, is scraped every second in OpenMetrics, sends a trace of every request to a collector and has a
dashboard open. Then a stream on the second one runs with and without a crowd of dashboards, and it is left idle for a
while, scraped as usual, every 15 s.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
from rich.console import Console

from benchmarks.http import http_rate, server_settings
from benchmarks.machine import machine_info, usable_cores
from benchmarks.models import default_workdir, random_prompts, resolve_model
from benchmarks.pairs import interval
from benchmarks.report import print_machine
from benchmarks.server import HOST, Server, running_server
from benchmarks.sse_client import HttpError, run_streams
from benchmarks.worker import WorkerError, stop_on_sigterm

OPENMETRICS = {"Accept": "application/openmetrics-text; version=1.0.0"}
SCRAPE_S, USUAL_SCRAPE_S = 1.0, 15.0
ALONE = {"VRM_MONITORING_INTERVAL_S": "3600"}
STREAM_TOKENS = 400
POLLING = "/socket.io/?EIO=4&transport=polling"


class Collector(BaseHTTPRequestHandler):
    """Takes whatever spans come."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None: ...


@contextlib.contextmanager
def collector() -> Iterator[str]:
    """Where spans may be sent."""
    server = ThreadingHTTPServer((HOST, 0), Collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://{HOST}:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(
    port: int, method: str, path: str, headers: dict[str, str], body: str | None = None
) -> tuple[http.client.HTTPMessage, bytes]:
    """One request over a connection of its own. Raises `HttpError` for anything but 200."""
    with contextlib.closing(http.client.HTTPConnection(HOST, port, timeout=60)) as connection:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        data = response.read()
    if response.status != 200:
        raise HttpError(f"{method} {path}: status {response.status}: {data[:300].decode(errors='replace')}")
    return response.headers, data


@dataclass
class Watchers:
    """Threads that ask a server again and again. What goes wrong in one is raised by `check`."""

    stopped: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)
    asked: int = 0

    def add(self, work: Callable[[], None], every_s: float) -> None:
        def run() -> None:
            try:
                while not self.stopped.wait(every_s):
                    work()
                    self.asked += 1
            except Exception as error:  # noqa: BLE001  raised by `check`
                if not self.stopped.is_set():
                    self.errors.append(error)

        self.threads.append(threading.Thread(target=run, daemon=True))
        self.threads[-1].start()

    def check(self) -> None:
        if self.errors:
            raise WorkerError(f"a watcher failed: {self.errors[0]}")
        if self.threads and not self.asked:
            raise WorkerError("nobody has watched")


def scrape(server: Server) -> None:
    """As Prometheus does."""
    ask(server.port, "GET", "/metrics", {"Authorization": f"Bearer {server.token}", **OPENMETRICS})


class Viewer:
    """A page of the dashboard, by long polling."""

    def __init__(self, server: Server, own: dict[str, str]) -> None:
        self._port, self._own = server.port, own
        _, body = ask(self._port, "GET", POLLING, own)
        self._path = f"{POLLING}&sid={json.loads(body[1:])['sid']}"
        ask(self._port, "POST", self._path, own, "40")

    def fetch(self) -> None:
        """Wait for news; a ping is answered."""
        _, body = ask(self._port, "GET", self._path, self._own)
        if b"2" in body.split(b"\x1e"):
            ask(self._port, "POST", self._path, self._own, "3")

    def leave(self) -> None:
        """The page is closed."""
        ask(self._port, "POST", self._path, self._own, "1")


def sign_in(server: Server) -> dict[str, str]:
    """What a page sends with its requests."""
    origin = {"Origin": f"http://{HOST}:{server.port}"}
    headers, body = ask(
        server.port, "POST", "/dashboard/session", {**origin, "Authorization": f"Bearer {server.token}"}
    )
    cookie = (headers["Set-Cookie"] or "").partition(";")[0]
    return {**origin, "Cookie": cookie, "X-Dashboard-Session": json.loads(body)["csrf"]}


@contextlib.contextmanager
def watched(server: Server, *, viewers: int, scrape_s: float | None) -> Iterator[None]:
    """So many dashboards are open, and metrics are scraped."""
    watchers = Watchers()
    if scrape_s is not None:
        watchers.add(lambda: scrape(server), scrape_s)
    own = sign_in(server) if viewers else {}
    pages = [Viewer(server, own) for _ in range(viewers)]
    for page in pages:
        watchers.add(page.fetch, 0.0)
    try:
        yield
        watchers.check()
    finally:
        watchers.stopped.set()
        for page in pages:
            page.leave()
        for thread in watchers.threads:
            thread.join(30)


def throughput(
    alone: Server, observed: Server, arguments: argparse.Namespace, vocab_size: int, progress: Console
) -> list[float]:
    """The rate of the watched server over that of the other, pair by pair."""
    ratios: list[float] = []
    for number in range(-1, arguments.pairs):
        prompts = random_prompts(arguments.streams, arguments.prompt_tokens, vocab_size, seed=number + 2)
        rates: dict[str, float] = {}
        for name in ("alone", "observed") if number % 2 else ("observed", "alone"):
            if name == "alone":
                rates[name], _ = http_rate(alone, prompts, arguments.new_tokens)
                continue
            with watched(observed, viewers=1, scrape_s=SCRAPE_S):
                rates[name], _ = http_rate(observed, prompts, arguments.new_tokens)
        if number >= 0:
            ratios.append(rates["observed"] / rates["alone"])
            progress.print(f"[dim]pair {number + 1}: {ratios[-1]:.3f}[/]", highlight=False)
    return ratios


def token_s(server: Server, vocab_size: int, seed: int) -> float:
    """Seconds between the tokens of one stream."""
    prompts = random_prompts(1, 16, vocab_size, seed=seed)
    _, (answer,) = run_streams(HOST, server.port, server.token, server.model, prompts, STREAM_TOKENS)
    return (answer.chunk_times_s[-1] - answer.chunk_times_s[0]) / (answer.completion_tokens - 1)


def crowd(server: Server, arguments: argparse.Namespace, vocab_size: int, progress: Console) -> list[float]:
    """The pace of a stream while a crowd watches, over its pace alone."""
    ratios: list[float] = []
    token_s(server, vocab_size, 0)
    for number in range(arguments.crowd_pairs):
        paces: dict[int, float] = {}
        for viewers in (0, arguments.viewers) if number % 2 else (arguments.viewers, 0):
            with watched(server, viewers=viewers, scrape_s=None):
                paces[viewers] = token_s(server, vocab_size, number + 1)
        ratios.append(paces[0] / paces[arguments.viewers])
        progress.print(f"[dim]crowd {number + 1}: {ratios[-1]:.3f}[/]", highlight=False)
    return ratios


def idle_share(server: Server, seconds: float) -> float:
    """Of one core, that the server and its processes use while nothing is asked but its metrics."""
    process = psutil.Process(server.process.pid)

    def used_s() -> float:
        return sum(sum(each.cpu_times()[:2]) for each in (process, *process.children(recursive=True)))

    with watched(server, viewers=0, scrape_s=min(USUAL_SCRAPE_S, seconds / 2)):
        before_s, began_s = used_s(), time.perf_counter()
        time.sleep(seconds)
        return (used_s() - before_s) / (time.perf_counter() - began_s)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.observing",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="small", help="443m, small, or a folder with a Hugging Face checkpoint")
    parser.add_argument("--pairs", type=int, default=20, help="pairs of runs, watched and alone")
    parser.add_argument("--crowd-pairs", type=int, default=10, help="pairs of streams with and without a crowd")
    parser.add_argument("--viewers", type=int, default=50, help="dashboards in the crowd")
    parser.add_argument("--streams", type=int, default=16, help="concurrent requests")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="tokens in each prompt")
    parser.add_argument("--new-tokens", type=int, default=200, help="tokens generated for each request")
    parser.add_argument("--idle-s", type=float, default=60.0, help="seconds of idleness")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="compute threads")
    parser.add_argument("--workdir", type=Path, default=default_workdir(), help="models and logs")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure all three; returns the exit status."""
    stop_on_sigterm()
    arguments = build_parser().parse_args(argv)
    progress, console = Console(stderr=True), Console()
    model_dir = resolve_model(arguments.model, arguments.workdir)
    vocab_size = json.loads((model_dir / "config.json").read_text())["vocab_size"]
    print_machine(console, machine_info(), arguments.threads)
    settings = server_settings(arguments, model_dir) | {"VRM_ENGINE_KV_CACHE_TOKENS": "32768"}
    try:
        with contextlib.ExitStack() as stack:
            logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            traced = {"VRM_TRACING": "1", "OTEL_EXPORTER_OTLP_ENDPOINT": stack.enter_context(collector())}
            watchful = settings | traced | {"VRM_MONITORING_INTERVAL_S": "1"}
            observed = stack.enter_context(running_server(watchful, logs / f"observed-{os.getpid()}.log"))
            idle = idle_share(observed, arguments.idle_s)
            crowds = crowd(observed, arguments, vocab_size, progress)
            alone = stack.enter_context(running_server(settings | ALONE, logs / f"alone-{os.getpid()}.log"))
            ratios = throughput(alone, observed, arguments, vocab_size, progress)
    except (WorkerError, HttpError) as error:
        progress.print(f"[red]{error}[/]", highlight=False)
        return 1
    for said, values in (
        (f"{arguments.streams} streams, watched", ratios),
        (f"a stream, {arguments.viewers} viewers", crowds),
    ):
        low, high = interval(values)
        console.print(
            f"{said}: {statistics.median(values):.1%} of the pace alone (95 % interval {low:.1%} to {high:.1%}, "
            f"{len(values)} pairs)",
            highlight=False,
        )
    console.print(f"idle, scraped every {USUAL_SCRAPE_S:g} s: {idle:.2%} of one core", highlight=False)
    if arguments.json:
        arguments.json.write_text(json.dumps({"watched": ratios, "crowd": crowds, "idle_share": idle}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
