"""What bad company costs: the server's answers while other clients stall, do not read, or come in crowds.

    python -m benchmarks.front_door [--rounds 5]

One real server with the demo model. Rounds without and with bad company alternate; in each, `/live` is asked again and
again and one stream with a token runs. Then more streams than the limits allow come at once, and kept-alive connections
are compared with new ones.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine_info, usable_cores
from benchmarks.report import print_machine
from benchmarks.server import HOST, Server, running_server
from benchmarks.worker import WorkerError, stop_on_sigterm

LIVE_REQUESTS = 50
STREAM_TOKENS = 400
HALF_HEAD = b"GET /live HTTP/1.1\r\nHos"
HALF_BODY = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"
SMALL_BUFFER_BYTES = 4096
"""What the kernel takes for a client that never reads."""
UNREAD_TOKENS = 200


@dataclass
class Crowd:
    """How many clients of each kind."""

    half_heads: int
    half_bodies: int
    never_reading: int
    streams: int


@dataclass
class Round:
    """Milliseconds of each `/live`, and seconds between the tokens of a stream."""

    live_ms: list[float]
    token_s: float


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.front_door",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds without and with bad company")
    parser.add_argument("--half-heads", type=int, default=1000, help="connections that stall in the header")
    parser.add_argument("--half-bodies", type=int, default=300, help="connections that stall in the body")
    parser.add_argument("--never-reading", type=int, default=100, help="connections that ask and never read")
    parser.add_argument("--streams", type=int, default=320, help="streams beyond what the server takes at a time")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    return parser


def completion_request(server: Server, tokens: int, **fields: object) -> bytes:
    """A streamed completion, as bytes."""
    body = json.dumps(
        {"model": server.model, "prompt": "Once", "max_tokens": tokens, "ignore_eos": True, "stream": True, **fields}
    )
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.token}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return (head + body).encode()


@contextlib.contextmanager
def bad_company(server: Server, crowd: Crowd) -> Iterator[None]:
    """Hold all these connections open, and begin when what they asked for has been generated."""
    unread = completion_request(server, UNREAD_TOKENS, logprobs=5)
    held: list[socket.socket] = []
    try:
        for count, data in (
            (crowd.never_reading, unread),
            (crowd.half_heads, HALF_HEAD),
            (crowd.half_bodies, HALF_BODY),
        ):
            for _ in range(count):
                connection = socket.socket()
                held.append(connection)
                connection.settimeout(30)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER_BYTES)
                connection.connect((HOST, server.port))
                connection.sendall(data)
            while server.get("/api/queue/status")["unfinished"]:
                time.sleep(0.1)
        yield
    finally:
        for connection in held:
            connection.close()


def live_ms(port: int) -> float:
    """One `/live` over a connection of its own."""
    start_s = time.perf_counter()
    with contextlib.closing(http.client.HTTPConnection(HOST, port, timeout=30)) as connection:
        connection.request("GET", "/live")
        connection.getresponse().read()
    return (time.perf_counter() - start_s) * 1e3


async def stream(server: Server, tokens: int, events: list[float]) -> str:
    """One streamed completion; notes when events came. Returns what became of it: `done`, a status, or `reset`."""
    data = b""
    try:
        reader, writer = await asyncio.open_connection(HOST, server.port)
        writer.write(completion_request(server, tokens))
        while piece := await reader.read(65536):
            events.append(time.perf_counter())
            data += piece
        writer.close()
    except OSError:
        return "reset"
    status = data.split(b" ", 2)[1:2]
    if status != [b"200"]:
        retry = b"retry-after:" in data.lower()
        return f"{status[0].decode()}{' with Retry-After' if retry else ''}" if status else "reset"
    return "done" if b"data: [DONE]" in data else "broken off"


def measure(server: Server) -> Round:
    """`/live` while one stream with a token runs."""
    events: list[float] = []
    latencies: list[float] = []

    async def both() -> str:
        task = asyncio.create_task(stream(server, STREAM_TOKENS, events))
        while not events:
            await asyncio.sleep(0.01)
        for _ in range(LIVE_REQUESTS):
            latencies.append(await asyncio.to_thread(live_ms, server.port))
            await asyncio.sleep(0.02)
        return await task

    became = asyncio.run(both())
    if became != "done":
        raise WorkerError(f"the stream ended with {became}")
    return Round(latencies, (events[-1] - events[0]) / STREAM_TOKENS)


def siege(server: Server, crowd: Crowd, rounds: int, progress: Console) -> dict[str, list[Round]]:
    """Alternate between rounds alone and in bad company."""
    found: dict[str, list[Round]] = {"alone": [], "in bad company": []}
    measure(server)  # a first one warms up
    for number in range(rounds):
        for name in found if number % 2 else reversed(found):
            company = bad_company(server, crowd) if name != "alone" else contextlib.nullcontext()
            with company:
                found[name].append(measure(server))
            progress.print(f"[dim]round {number + 1}, {name}: {statistics.median(found[name][-1].live_ms):.1f} ms[/]")
    return found


def crowd_of_streams(server: Server, count: int) -> Counter[str]:
    """What became of `count` streams that came at once."""

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*(stream(server, 16, []) for _ in range(count)))

    return Counter(asyncio.run(all_of_them()))


def get_ms(port: int, *, kept_alive: bool, count: int = 300) -> float:
    """Median of a small GET over one connection, or over a new one each."""
    times: list[float] = []
    connection = http.client.HTTPConnection(HOST, port, timeout=30)
    for _ in range(count):
        start_s = time.perf_counter()
        connection.request("GET", "/live")
        connection.getresponse().read()
        times.append((time.perf_counter() - start_s) * 1e3)
        if not kept_alive:
            connection.close()
    connection.close()
    return statistics.median(times)


def report(found: dict[str, list[Round]], console: Console) -> dict[str, float]:
    """Print the table of the siege; returns its numbers."""
    table = Table(title=f"{len(next(iter(found.values())))} rounds", title_justify="left")
    for column in ("", "/live ms, median", "slowest", "ms per token"):
        table.add_column(column, justify="right" if column else "left")
    for name, rounds in found.items():
        live = [value for one in rounds for value in one.live_ms]
        pace = statistics.median(one.token_s for one in rounds)
        table.add_row(name, f"{statistics.median(live):.1f}", f"{max(live):.1f}", f"{pace * 1e3:.2f}")
    console.print(table)
    pairs = zip(found["alone"], found["in bad company"], strict=True)
    ratio = statistics.median(alone.token_s / company.token_s for alone, company in pairs)
    console.print(f"a stream's pace in bad company: {ratio:.1%} of its pace alone", highlight=False)
    slowest = max(value for one in found["in bad company"] for value in one.live_ms)
    return {"slowest_live_ms": slowest, "pace_ratio": ratio}


def main(argv: list[str] | None = None) -> int:
    """Run all of it; returns the exit status."""
    stop_on_sigterm()
    arguments = build_parser().parse_args(argv)
    progress, console = Console(stderr=True), Console()
    print_machine(console, machine_info(), usable_cores())
    crowd = Crowd(arguments.half_heads, arguments.half_bodies, arguments.never_reading, arguments.streams)
    with tempfile.TemporaryDirectory() as folder:
        try:
            with running_server({}, Path(folder) / "server.log") as server:
                numbers: dict[str, object] = dict(report(siege(server, crowd, arguments.rounds, progress), console))
                queue = server.get("/api/queue/status")
                limit = queue["limit"] + server.get("/api/batcher/stats")["max_batch_size"]
                became = crowd_of_streams(server, limit + crowd.streams)
                console.print(f"{limit + crowd.streams} streams at once: {dict(became)}", highlight=False)
                new, kept = get_ms(server.port, kept_alive=False), get_ms(server.port, kept_alive=True)
                console.print(f"a small GET: {new:.2f} ms over a new connection, {kept:.2f} ms over a kept one")
        except WorkerError as error:
            progress.print(f"[red]{error}[/]", highlight=False)
            return 1
    if arguments.json:
        numbers.update(streams=dict(became), new_connection_ms=new, kept_connection_ms=kept)
        arguments.json.write_text(json.dumps(numbers, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
