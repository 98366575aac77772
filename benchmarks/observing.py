"""What watching costs: a server that is scraped, traced and looked at, beside the same one left alone.

    python -m benchmarks.observing [--pairs 60] [--viewers 50] [--watch scraping,tracing,dashboard]

Streams run all the time, each asks again when its answer is over. Every few seconds the server is watched, or left
alone again: metrics are scraped every 2 s in OpenMetrics, a trace of every request goes to a collector, a dashboard
is open; `--watch` leaves some of these out. A watched moment is compared with those before and after it, so what the
machine does meanwhile touches both. Devices are read every second in both; the last number has that in it. The clients
run on the same cores. Then a stream runs with and without a crowd of dashboards, and the server is left idle for a
while, scraped every 15 s as usual.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import itertools
import json
import os
import secrets
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

from benchmarks.http import server_settings
from benchmarks.machine import machine_info, usable_cores
from benchmarks.models import default_workdir, random_prompts, resolve_model
from benchmarks.pairs import interval
from benchmarks.report import print_machine
from benchmarks.server import HOST, Server, running_server
from benchmarks.sse_client import HttpError, completion_body, request_head, run_streams
from benchmarks.worker import WorkerError, stop_on_sigterm

OPENMETRICS = {"Accept": "application/openmetrics-text; version=1.0.0"}
SCRAPE_S, USUAL_SCRAPE_S = 2.0, 15.0
STREAM_TOKENS = 400
SETTLE_S = 1.5
"""Dashboards that were just opened have had their first look by then, and most requests are of this moment."""
WAYS = ("scraping", "tracing", "dashboard")
EVENT, END = b'data: {"id"', b"data: [DONE]"
MAX_SPLIT = 64
MANY = 30
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

    def add(self, work: Callable[[], None], every_s: float, leave: Callable[[], None] = lambda: None) -> None:
        """Do `work` every so often until stopped, then `leave`."""

        def run() -> None:
            try:
                while not self.stopped.wait(every_s):
                    work()
                    self.asked += 1
                leave()
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
        """The page is closed, between two fetches: one that waits meanwhile would wait for the next ping."""
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
        watchers.add(page.fetch, 0.0, page.leave)
    try:
        yield
        watchers.check()
    finally:
        watchers.stopped.set()
        for thread in watchers.threads:
            thread.join(30)


class Load:
    """So many streams, from `start` to `stop`. `traced`: whether requests that begin now are. `tokens` are the times at
    which some came, with how many; `errors` is what went wrong."""

    def __init__(self, server: Server, arguments: argparse.Namespace, vocab_size: int) -> None:
        self.traced = False
        self.tokens: list[tuple[float, int]] = []
        self.errors: list[BaseException] = []
        self._server = server
        self._seeds = itertools.count()
        self._arguments, self._vocab_size = arguments, vocab_size
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Once the answers that are under way are over."""
        self._stopped.set()
        self._thread.join()

    def rate(self, since_s: float, until_s: float) -> float:
        """Tokens per second between two moments. Raises what went wrong."""
        if self.errors:
            raise WorkerError(f"a stream failed: {self.errors[0]}")
        return sum(count for when_s, count in self.tokens if since_s < when_s <= until_s) / (until_s - since_s)

    def _run(self) -> None:
        async def all_streams() -> None:
            await asyncio.gather(*(self._stream() for _ in range(self._arguments.streams)))

        try:
            asyncio.run(all_streams())
        except Exception as error:  # noqa: BLE001  raised by `rate`
            self.errors.append(error)

    async def _stream(self) -> None:
        while not self._stopped.is_set():
            (prompt,) = random_prompts(1, self._arguments.prompt_tokens, self._vocab_size, seed=next(self._seeds))
            body = completion_body(self._server.model, prompt, self._arguments.new_tokens)
            recorded = "01" if self.traced else "00"
            caller = f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-{recorded}"
            await self._request(
                request_head(HOST, self._server.port, self._server.token, body, {"traceparent": caller}) + body
            )

    async def _request(self, request: bytes) -> None:
        reader, writer = await asyncio.open_connection(HOST, self._server.port)
        writer.write(request)
        data, begun = b"", False
        while piece := await reader.read(65536):
            if not begun and not piece.startswith(b"HTTP/1.1 200 "):
                raise HttpError(piece[:500].decode(errors="replace"))
            begun, before = True, data[-MAX_SPLIT:]  # an event may come in two pieces
            data = before + piece
            self.tokens.append((time.perf_counter(), data.count(EVENT) - before.count(EVENT)))
        writer.close()
        if END not in data:
            raise HttpError("a stream ended early")


def throughput(server: Server, arguments: argparse.Namespace, vocab_size: int, progress: Console) -> list[float]:
    """The rate of each watched moment over the mean of those before and after it."""
    load = Load(server, arguments, vocab_size)
    load.start()
    rates: list[float] = []
    ratios: list[float] = []
    try:
        time.sleep(arguments.moment_s)
        for number in range(2 * arguments.pairs + 1):
            on = bool(number % 2)
            load.traced = on and "tracing" in arguments.watch
            scrape_s = SCRAPE_S if on and "scraping" in arguments.watch else None
            with watched(server, viewers=int(on and "dashboard" in arguments.watch), scrape_s=scrape_s):
                time.sleep(SETTLE_S)
                began_s = time.perf_counter()
                time.sleep(arguments.moment_s)
                rates.append(load.rate(began_s, time.perf_counter()))
            if number and not on:
                before, there, after = rates[-3:]
                ratios.append(2 * there / (before + after))
                progress.print(f"[dim]moment {len(ratios)}: {ratios[-1]:.3f} of {after:.0f}/s[/]", highlight=False)
    finally:
        load.stop()
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


def ways(text: str) -> tuple[str, ...]:
    """Those in which a server is watched, from the command line."""
    names = tuple(name.strip() for name in text.split(","))
    if unknown := [name for name in names if name not in WAYS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(WAYS)}")
    return names


def mean_text(values: list[float]) -> str:
    """The mean with its 95 % interval, where there are enough for that to be normal."""
    if len(values) < MANY:
        return ""
    mean, off = statistics.fmean(values), 1.96 * statistics.stdev(values) / len(values) ** 0.5
    return f"; mean {mean:.1%} ({mean - off:.1%} to {mean + off:.1%})"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.observing",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="small", help="443m, small, or a folder with a Hugging Face checkpoint")
    parser.add_argument("--pairs", type=int, default=60, help="watched moments")
    parser.add_argument("--watch", type=ways, default=",".join(WAYS), help="how the watched server is watched")
    parser.add_argument("--moment-s", type=float, default=2.5, help="seconds of each moment")
    parser.add_argument(
        "--crowd-pairs", type=int, default=10, help="pairs of streams with and without a crowd, 0: none"
    )
    parser.add_argument("--viewers", type=int, default=50, help="dashboards in the crowd")
    parser.add_argument("--streams", type=int, default=16, help="concurrent requests")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="tokens in each prompt")
    parser.add_argument("--new-tokens", type=int, default=100, help="tokens generated for each request")
    parser.add_argument("--idle-s", type=float, default=60.0, help="seconds of idleness, 0: none")
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
            server = stack.enter_context(running_server(watchful, logs / f"observed-{os.getpid()}.log"))
            idle = idle_share(server, arguments.idle_s) if arguments.idle_s else None
            crowds = crowd(server, arguments, vocab_size, progress)
            ratios = throughput(server, arguments, vocab_size, progress)
    except (WorkerError, HttpError) as error:
        progress.print(f"[red]{error}[/]", highlight=False)
        return 1
    for said, values in (
        (f"{arguments.streams} streams, watched by {', '.join(arguments.watch)}", ratios),
        (f"a stream, {arguments.viewers} viewers", crowds),
    ):
        if not values:
            continue
        low, high = interval(values)
        console.print(
            f"{said}: {statistics.median(values):.1%} of the pace alone (95 % interval {low:.1%} to {high:.1%}, "
            f"{len(values)} times){mean_text(values)}",
            highlight=False,
        )
    if idle is not None:
        console.print(f"idle, scraped every {USUAL_SCRAPE_S:g} s: {idle:.2%} of one core", highlight=False)
    if arguments.json:
        arguments.json.write_text(json.dumps({"watched": ratios, "crowd": crowds, "idle_share": idle}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
