"""VTP beside a bare TCP connection: large payloads one way, small ones there and back, to another process.

    python -m benchmarks.vtp [--rounds 30] [--megabits 1000] [--tls]

All run in turn, so that the machine's moods meet all. A large payload is over when the other process has all of it and
has said so; it lands in memory that was there before. What TCP does not do and VTP does: a header, checksums, credit,
and a thread that reads. Over loopback VTP runs twice, through the kernel and through memory that both processes see.
With `--megabits` the other process is in a network namespace of its own behind a link of that rate (root). With `--tls`
VTP runs once more, as a cluster with `cluster.tls` has it; both processes then encrypt and decrypt on this machine.
Where NIXL is installed, large payloads run once more by it, over whatever UCX finds: without a card that does RDMA,
that is TCP or the memory of one host, and what is measured are the copies around it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine_info, usable_cores
from benchmarks.namespaces import Network, lacking
from benchmarks.report import print_machine
from core.errors import NetworkError
from core.network.certificates import new_identity
from core.network.connection import Connection
from core.network.frames import KIB, MIB, Header, Opcode
from core.network.greeting import answer, introduce
from core.network.handshake import derive_key
from core.network.link import Link
from core.network.nixl_agent import Agent, NixlAgent, is_installed, rdma_devices
from core.network.rdma import RDMA_ASKED_S, no_agent

HOST, OTHER_HOST = "127.0.0.1", "127.0.0.2"
"""Ends with different addresses do not look for shared memory."""
LARGE, SMALL = (4 * MIB, 16 * MIB, 64 * MIB), (1 * KIB, 16 * KIB, 256 * KIB)
_TIMES = {"large": 12, "small": 100}
_RESAMPLES = 2000
_ACK = b"!"
_TOKEN, _NODE = "only for this measurement", "a" * 32


class Far:
    """The other process's end of a link: takes payloads into one buffer, and answers."""

    def __init__(self, sock: Connection, new_agent: Callable[[], Agent]) -> None:
        self._buffer = memoryview(bytearray(max(LARGE)))
        self.ended = threading.Event()
        self._link = Link(sock, 1, 0, self, name="far", new_agent=new_agent)
        self._link.start()

    def buffer_for(self, header: Header) -> memoryview | None:
        return self._buffer

    def received(self, header: Header, payload: memoryview) -> bool:
        if header.opcode is Opcode.ECHO:
            self._link.send(Opcode.ECHOED, [payload], step=header.step)
        else:
            self._link.send(Opcode.ANSWER, step=header.step)
        return True

    def lost(self, error: NetworkError) -> None:
        self.ended.set()


def new_agent() -> Agent:
    """By cards that do RDMA, or by what UCX finds on loopback."""
    if not (devices := rdma_devices()):
        os.environ.setdefault("UCX_NET_DEVICES", "lo")
    return NixlAgent(devices)


class Near:
    """This process's end: sends, and waits for the answer."""

    def __init__(self, sock: Connection, new_agent: Callable[[], Agent] = no_agent) -> None:
        self._buffer = memoryview(bytearray(max(LARGE)))
        self._changed = threading.Condition()
        self._missing = 0
        self._lost: NetworkError | None = None
        self.link = Link(sock, 0, 1, self, name="near", new_agent=new_agent)
        self.link.start()
        self.link.ask_for_rdma(RDMA_ASKED_S)

    def buffer_for(self, header: Header) -> memoryview | None:
        return self._buffer

    def received(self, header: Header, payload: memoryview) -> bool:
        with self._changed:
            self._missing -= 1
            self._changed.notify_all()
        return True

    def lost(self, error: NetworkError) -> None:
        with self._changed:
            self._lost = error
            self._changed.notify_all()

    def _ask(self, opcode: Opcode, data: memoryview) -> None:
        with self._changed:
            self._missing += 1
        self.link.send(opcode, [data])
        self.link.wait_for(lambda: self._missing <= 0 or self._lost is not None, self._changed)
        if self._lost is not None:
            raise self._lost

    def large(self, data: memoryview) -> None:
        """One way, and an answer without a payload."""
        self._ask(Opcode.KV_PAGES, data)

    def small(self, data: memoryview) -> None:
        """There and back."""
        self._ask(Opcode.ECHO, data)

    def close(self) -> None:
        self.link.close("measured")


class Bare:
    """A TCP connection with nothing on it."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self._buffer = memoryview(bytearray(max(LARGE)))

    def _say(self, back: bool, nbytes: int) -> bytes:
        return nbytes.to_bytes(8, "little") + bytes([back])

    def large(self, data: memoryview) -> None:
        self.sock.sendmsg([self._say(False, len(data))])
        self.sock.sendall(data)
        read(self.sock, self._buffer[:1])

    def small(self, data: memoryview) -> None:
        self.sock.sendall(self._say(True, len(data)) + data)
        read(self.sock, self._buffer[: len(data)])

    def close(self) -> None:
        self.sock.close()


def read(sock: socket.socket, view: memoryview) -> None:
    """Fill the view. Raises `EOFError` at the end."""
    while view:
        count = sock.recv_into(view, 0, socket.MSG_WAITALL)
        if not count:
            raise EOFError
        view = view[count:]


def answer_bare(sock: socket.socket) -> None:
    """The other process's end of a bare connection."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    head, buffer = memoryview(bytearray(9)), memoryview(bytearray(max(LARGE)))
    try:
        while True:
            read(sock, head)
            nbytes = int.from_bytes(head[:8], "little")
            read(sock, buffer[:nbytes])
            sock.sendall(buffer[:nbytes] if head[8] else _ACK)
    except EOFError:
        sock.close()


def other_process(host: str, port: int, ways: Sequence[str]) -> None:
    """A connection for each way becomes a link, and one more stays bare."""
    links = []
    for way in ways:
        own, _, tls = way.partition("+")
        sock = socket.create_connection((host, port), source_address=(own, 0))
        encrypted = tls == "tls"
        connection = introduce(sock, derive_key(_TOKEN), _NODE, "data", new_identity()) if encrypted else sock
        links.append(Far(connection, new_agent if tls == "rdma" else no_agent))
    answer_bare(socket.create_connection((host, port), source_address=(ways[0].partition("+")[0], 0)))
    for link in links:
        link.ended.wait()


def accept(server: socket.socket, way: str) -> Near:
    """This process's end of what the other one connects."""
    sock = server.accept()[0]
    if not way.endswith("+tls"):
        return Near(sock, new_agent if way.endswith("+rdma") else no_agent)
    sock.setblocking(False)
    return Near(asyncio.run(answer(sock, derive_key(_TOKEN), _NODE, identity=new_identity()))[1])


def seconds(send: Callable[[memoryview], None], data: memoryview, times: int) -> float:
    """Of one, the median of some."""
    taken = []
    for _ in range(times):
        began_s = time.perf_counter()
        send(data)
        taken.append(time.perf_counter() - began_s)
    return statistics.median(taken)


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """95 % of the medians of resamples."""
    dice = random.Random(0)
    medians = sorted(statistics.median(dice.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES))
    return medians[int(0.025 * _RESAMPLES)], medians[int(0.975 * _RESAMPLES)]


def measure(near: dict[str, Near], bare: Bare, title: str, rounds: int) -> Table:
    """All in turn, the one that begins alternating."""
    table = Table(title=title)
    for name in ("payload", "", "way", "VTP", "TCP", "ratio", "95 %"):
        table.add_column(name, justify="right" if name not in ("", "way") else "left")
    for kind, sizes in (("large", LARGE), ("small", SMALL)):
        for nbytes in sizes:
            data, rows = memoryview(bytearray(nbytes)), []
            ways = [
                way for way in near if kind == "large" or way not in ("memory", "NIXL")
            ]  # what is small: the kernel
            for number in range(rounds):
                ends: list[tuple[str, Near | Bare]] = [*((way, near[way]) for way in ways), ("bare", bare)]
                if number % 2:
                    ends.reverse()
                rows.append({name: seconds(getattr(end, kind), data, _TIMES[kind]) for name, end in ends})
            for way in ways:
                shown = f"{way}, not quicker" if way == "NIXL" and not near[way].link.stats.sent_rdma_bytes else way
                table.add_row(*row(kind, nbytes, shown, [(each[way], each["bare"]) for each in rows]))
    return table


def row(kind: str, nbytes: int, way: str, pairs: Sequence[tuple[float, float]]) -> list[str]:
    """Large ones as rates, in multiples of TCP's; small ones as times, in multiples of TCP's."""
    vtp, tcp = (statistics.median(each) for each in zip(*pairs, strict=True))
    size = f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // KIB} KiB"
    if kind == "large":
        ratios, what = [theirs / ours for ours, theirs in pairs], "one way"
        shown = [f"{nbytes / each / 1e9:.2f} GB/s" for each in (vtp, tcp)]
    else:
        ratios, what = [ours / theirs for ours, theirs in pairs], "there and back"
        shown = [f"{each * 1e6:.0f} us" for each in (vtp, tcp)]
    low, high = interval(ratios)
    return [size, what, way, *shown, f"{statistics.median(ratios):.2f}", f"{low:.2f}-{high:.2f}"]


def run(host: str, ways: dict[str, str], before: Sequence[str], title: str, rounds: int) -> Table:
    """`ways`: the other process's addresses, "+tls" behind those that encrypt, "+rdma" behind those that have NIXL, by
    what they are called. `before` starts the other process."""
    with socket.create_server((host, 0)) as server:
        port = server.getsockname()[1]
        command = [*before, sys.executable, "-m", "benchmarks.vtp", "--other", host, str(port), *ways.values()]
        with subprocess.Popen(command, cwd=Path(__file__).parents[1]) as other:
            near = {name: accept(server, way) for name, way in ways.items()}
            bare = Bare(server.accept()[0])
            try:
                return measure(near, bare, title, rounds)
            finally:
                ends: list[Near | Bare] = [bare, *near.values()]
                for end in ends:
                    end.close()
                other.wait()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vtp", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="of each size (default: %(default)s)")
    parser.add_argument("--megabits", type=float, help="over a link of so many Mbit/s instead of loopback")
    parser.add_argument("--tls", action="store_true", help="encrypted as well")
    parser.add_argument("--other", nargs="+", help=argparse.SUPPRESS)  # the process that is started
    options = parser.parse_args()
    if options.other:
        host, port, *ways = options.other
        other_process(host, int(port), ways)
        return 0
    console = Console()
    print_machine(console, machine_info(), usable_cores())
    if options.megabits is None:
        title = "VTP and bare TCP over loopback, to another process"
        found = {"kernel": OTHER_HOST, "memory": HOST} | ({"TLS": f"{OTHER_HOST}+tls"} if options.tls else {})
        if is_installed():
            found["NIXL"] = f"{OTHER_HOST}+rdma"
        console.print(run(HOST, found, (), title, options.rounds))
    elif (reason := lacking()) is not None:
        parser.error(f"no network namespaces: {reason}")
    else:
        with Network() as network:
            machine = network.add()
            machine.shape(options.megabits)
            title = f"VTP and bare TCP over {options.megabits:g} Mbit/s"
            found = {"kernel": machine.address} | ({"TLS": f"{machine.address}+tls"} if options.tls else {})
            console.print(run(network.address, found, machine.command(), title, options.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
