"""VTP beside a bare TCP connection: large payloads one way, small ones there and back, to another process.

    python -m benchmarks.vtp [--rounds 30]

Both run over loopback, in turn, so that the machine's moods meet both. A large payload is over when the other process
has all of it and has said so; it lands in memory that was there before, on both. What TCP does not do and VTP does:
a header, checksums, credit, and a thread that reads.
"""

from __future__ import annotations

import argparse
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
from core.network.frames import KIB, MIB, Header, Opcode
from core.network.link import Link

HOST = "127.0.0.1"
LARGE, SMALL = (4 * MIB, 16 * MIB, 64 * MIB), (1 * KIB, 16 * KIB, 256 * KIB)
_TIMES = {"large": 4, "small": 100}
_RESAMPLES = 2000
_ACK = b"!"


class Far:
    """The other process's end of a link: takes payloads into one buffer, and answers."""

    def __init__(self, sock: socket.socket) -> None:
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

    def __init__(self, sock: socket.socket) -> None:
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


def other_process(port: int) -> None:
    """Connects twice: the first connection becomes a link."""
    first, second = (socket.create_connection((HOST, port)) for _ in range(2))
    far = Far(first)
    answer_bare(second)
    far.ended.wait()


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


def measure(near: Near, bare: Bare, rounds: int) -> Table:
    """Both in turn, the one that begins alternating."""
    table = Table(title="VTP and bare TCP over loopback, to another process")
    for name in ("payload", "", "VTP", "TCP", "ratio", "95 %"):
        table.add_column(name, justify="left" if not name else "right")
    for kind, sizes in (("large", LARGE), ("small", SMALL)):
        for nbytes in sizes:
            data, pairs = memoryview(bytearray(nbytes)), []
            for number in range(rounds):
                ends = [("vtp", near), ("tcp", bare)]
                if number % 2:
                    ends.reverse()
                took = {name: seconds(getattr(end, kind), data, _TIMES[kind]) for name, end in ends}
                pairs.append((took["vtp"], took["tcp"]))
            table.add_row(*row(kind, nbytes, pairs))
    return table


def row(kind: str, nbytes: int, pairs: Sequence[tuple[float, float]]) -> list[str]:
    """Large ones as rates, VTP's share of TCP's; small ones as times, VTP's as multiples."""
    vtp, tcp = (statistics.median(each) for each in zip(*pairs, strict=True))
    size = f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // KIB} KiB"
    if kind == "large":
        ratios, what = [theirs / ours for ours, theirs in pairs], "one way"
        shown = [f"{nbytes / each / 1e9:.2f} GB/s" for each in (vtp, tcp)]
    else:
        ratios, what = [ours / theirs for ours, theirs in pairs], "there and back"
        shown = [f"{each * 1e6:.0f} us" for each in (vtp, tcp)]
    low, high = interval(ratios)
    return [size, what, *shown, f"{statistics.median(ratios):.2f}", f"{low:.2f}-{high:.2f}"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vtp", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="of each size (default: %(default)s)")
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)  # of the process that started this one
    options = parser.parse_args()
    if options.port is not None:
        other_process(options.port)
        return 0
    console = Console()
    print_machine(console, machine_info(), usable_cores())
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]
        command = [sys.executable, "-m", "benchmarks.vtp", "--port", str(port)]
        with subprocess.Popen(command, cwd=Path(__file__).parents[1]) as other:
            near, bare = Near(server.accept()[0]), Bare(server.accept()[0])
            try:
                console.print(measure(near, bare, options.rounds))
            finally:
                bare.sock.close()
                near.link.close("measured")
                other.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
