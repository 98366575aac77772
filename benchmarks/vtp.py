"""VTP beside a bare TCP connection: large payloads one way, small ones there and back, to another process.

    python -m benchmarks.vtp [--rounds 30] [--tls]

All run over loopback, in turn, so that the machine's moods meet all of them. A large payload is over when the other
process has all of it and has said so; it lands in memory that was there before. What TCP does not do and VTP does: a
header, checksums, credit, and a thread that reads. With `--tls` there is a third connection, VTP as a cluster with
`cluster.tls` has it; both processes then encrypt and decrypt on the same machine.
"""

from __future__ import annotations

import argparse
import asyncio
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
from benchmarks.report import print_machine
from core.errors import NetworkError
from core.network.certificates import new_identity
from core.network.connection import Connection
from core.network.frames import KIB, MIB, Header, Opcode
from core.network.greeting import answer, introduce
from core.network.handshake import derive_key
from core.network.link import Link

HOST = "127.0.0.1"
LARGE, SMALL = (4 * MIB, 16 * MIB, 64 * MIB), (1 * KIB, 16 * KIB, 256 * KIB)
_TIMES = {"large": 4, "small": 100}
_RESAMPLES = 2000
_ACK = b"!"
_TOKEN, _NODE = "only for this measurement", "a" * 32

Ends = dict[str, "Near | Bare"]


class Far:
    """The other process's end of a link: takes payloads into one buffer, and answers."""

    def __init__(self, sock: Connection) -> None:
        self._buffer = memoryview(bytearray(max(LARGE)))
        self.ended = threading.Event()
        self._link = Link(sock, 1, 0, self, name="far")
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


class Near:
    """This process's end: sends, and waits for the answer."""

    def __init__(self, sock: Connection) -> None:
        self._buffer = memoryview(bytearray(max(LARGE)))
        self._answered = threading.Semaphore(0)
        self.link = Link(sock, 0, 1, self, name="near")
        self.link.start()

    def buffer_for(self, header: Header) -> memoryview | None:
        return self._buffer

    def received(self, header: Header, payload: memoryview) -> bool:
        self._answered.release()
        return True

    def lost(self, error: NetworkError) -> None:
        self._answered.release()

    def large(self, data: memoryview) -> None:
        """One way, and an answer without a payload."""
        self.link.send(Opcode.KV_PAGES, [data])
        self._answered.acquire()

    def small(self, data: memoryview) -> None:
        """There and back."""
        self.link.send(Opcode.ECHO, [data])
        self._answered.acquire()

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


def other_process(port: int, tls: bool) -> None:
    """Connects twice: the first connection becomes a link. With TLS a third time, for another link."""
    first, second = (socket.create_connection((HOST, port)) for _ in range(2))
    links = [Far(first)]
    if tls:
        third = socket.create_connection((HOST, port))
        links.append(Far(introduce(third, derive_key(_TOKEN), _NODE, "data", new_identity())))
    answer_bare(second)
    for link in links:
        link.ended.wait()


def accept(server: socket.socket, tls: bool) -> Ends:
    """This process's ends of what the other one connects."""
    ends: Ends = {"VTP": Near(server.accept()[0]), "TCP": Bare(server.accept()[0])}
    if tls:
        sock = server.accept()[0]
        sock.setblocking(False)
        ends["TLS"] = Near(asyncio.run(answer(sock, derive_key(_TOKEN), _NODE, identity=new_identity()))[1])
    return ends


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


def measure(ends: Ends, rounds: int) -> Table:
    """All in turn, another one beginning each time."""
    table = Table(title="VTP and bare TCP over loopback, to another process")
    tls = "TLS" in ends
    for name in ("payload", "", "VTP", *(["VTP+TLS"] if tls else []), "TCP", "VTP:TCP", "95 %"):
        table.add_column(name, justify="left" if not name else "right")
    for name in ("TLS:VTP", "95 %") if tls else ():
        table.add_column(name, justify="right")
    for kind, sizes in (("large", LARGE), ("small", SMALL)):
        for nbytes in sizes:
            data = memoryview(bytearray(nbytes))
            took: dict[str, list[float]] = {name: [] for name in ends}
            for number in range(rounds):
                names = list(ends)
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    took[name].append(seconds(getattr(ends[name], kind), data, _TIMES[kind]))
            table.add_row(*row(kind, nbytes, took))
    return table


def row(kind: str, nbytes: int, took: dict[str, list[float]]) -> list[str]:
    """Large ones as rates, VTP's share of TCP's and TLS's of VTP's; small ones as times, and multiples."""
    size = f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // KIB} KiB"
    shown = [size, "one way" if kind == "large" else "there and back"]
    for name in ("VTP", "TLS", "TCP"):
        if name in took:
            median_s = statistics.median(took[name])
            shown.append(f"{nbytes / median_s / 1e9:.2f} GB/s" if kind == "large" else f"{median_s * 1e6:.0f} us")
    for ours, theirs in (("VTP", "TCP"), ("TLS", "VTP")):
        if ours in took:
            pairs = zip(took[ours], took[theirs], strict=True)
            ratios = [b / a if kind == "large" else a / b for a, b in pairs]
            low, high = interval(ratios)
            shown += [f"{statistics.median(ratios):.2f}", f"{low:.2f}-{high:.2f}"]
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vtp", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="of each size (default: %(default)s)")
    parser.add_argument("--tls", action="store_true", help="VTP that is encrypted as well")
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)  # of the process that started this one
    options = parser.parse_args()
    if options.port is not None:
        other_process(options.port, options.tls)
        return 0
    console = Console()
    print_machine(console, machine_info(), usable_cores())
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]
        command = [sys.executable, "-m", "benchmarks.vtp", "--port", str(port), *(["--tls"] if options.tls else [])]
        with subprocess.Popen(command, cwd=Path(__file__).parents[1]) as other:
            ends = accept(server, options.tls)
            try:
                console.print(measure(ends, options.rounds))
            finally:
                for end in ends.values():
                    end.close()
                other.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
