"""Every port of a master and a worker under attack, while they serve: who has no token gets nothing, and harms nothing.

    python -m benchmarks.siege --connections 10000

A master with the demo model and a worker that computes half of it run as users start them. Against each TCP port that
they have open (the API, the metrics, the cluster's, the worker's) come, in turn: connections that say nothing, all at
once; some that send a byte a second; HTTP where none is expected and random bytes; half a frame; a handshake with
another token; one that was recorded; another version of the protocol; and someone who knows the token and then sends
garbage. The UDP port gets random datagrams. Meanwhile a client has the same question answered again and again. The
run fails if an answer changes or does not come, if the worker is lost, if a process ends, if threads or files are left,
or if another worker cannot join afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import resource
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine_info, usable_cores
from benchmarks.report import print_machine
from core.network.frames import HEADER_BYTES, Opcode, read_header
from core.network.greeting import frame, greet
from core.network.handshake import Hello, derive_key, encode_message, new_nonce, prove

HOST = "127.0.0.1"
TOKEN = secrets.token_urlsafe(32)
START_S, ANSWER_S, IDLE_S, HELD_S = 120.0, 60.0, 60.0, 5.0
SLOW_BYTES = 5
SLACK = {"threads": 6, "files": 16}
"""Of pools and of connections that are closing."""
WORDS = {
    "prompt": "Once upon a time",
    "max_tokens": 48,
    "temperature": 0,
    "ignore_eos": True,
    "model": "vramancer-demo",
}


class Program:
    """A process, and what it has printed."""

    def __init__(self, home: Path, *flags: str, **variables: str) -> None:
        home.mkdir()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("VRM_", "XDG_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vramancer.main", *flags], cwd=Path(__file__).parents[1], text=True,
            env={**inherited, "HOME": str(home), "VRM_CLUSTER_TOKEN": TOKEN, "VRM_API_TOKEN": TOKEN, **variables},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.said = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line

    def says(self, pattern: str) -> re.Match[str]:
        wait(lambda: re.search(pattern, self.said), f"{pattern}\n{self.said}", START_S)
        found = re.search(pattern, self.said)
        assert found is not None
        return found

    def held(self) -> dict[str, int]:
        """Threads and open files."""
        about = psutil.Process(self.process.pid)
        return {"threads": about.num_threads(), "files": about.num_fds()}

    def ports(self) -> list[int]:
        """TCP ports that it listens on."""
        found = psutil.Process(self.process.pid).net_connections("tcp")
        return sorted({each.laddr.port for each in found if each.status == psutil.CONN_LISTEN})

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join()


def wait(condition: Callable[[], Any], what: str, patience_s: float) -> None:
    deadline_s = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"waited in vain for {what}")
        time.sleep(0.05)


def ask(port: int, path: str, body: dict[str, Any] | None = None) -> Any:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://{HOST}:{port}{path}", data, headers)
    with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
        return json.load(response)


class Client:
    """Asks the same again and again; what it was answered, and how long the longest answer took."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.expected = self._answer()
        self.answers, self.wrong, self.longest_s = 0, [], 0.0  # type: tuple[int, list[str], float]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _answer(self) -> str:
        text: str = ask(self._port, "/v1/completions", WORDS)["choices"][0]["text"]
        return text

    def _run(self) -> None:
        while not self._ended.wait(0.05):
            began_s = time.monotonic()
            try:
                found = self._answer()
            except Exception as error:  # noqa: BLE001  reported
                found = repr(error)
            self.longest_s = max(self.longest_s, time.monotonic() - began_s)
            self.answers += 1
            if found != self.expected:
                self.wrong.append(found)

    def close(self) -> None:
        self._ended.set()
        self._thread.join()


# -- attacks ----------------------------------------------------------------------------------------------------------


def connect(port: int) -> socket.socket | None:
    with contextlib.suppress(OSError):
        return socket.create_connection((HOST, port), timeout=5.0)
    return None


@contextlib.contextmanager
def connections(port: int, count: int) -> Iterator[list[socket.socket]]:
    """So many at once; those that were not taken are missing."""
    found = [sock for sock in (connect(port) for _ in range(count)) if sock is not None]
    try:
        yield found
    finally:
        for sock in found:
            sock.close()


def end_of(sock: socket.socket) -> str:
    """How the other end ended it, if it did."""
    sock.settimeout(HELD_S + 5.0)
    try:
        while sock.recv(1 << 16):
            pass
    except TimeoutError:
        return "held"
    except OSError:
        return "reset"
    return "closed"


def silent(port: int, count: int) -> str:
    with connections(port, count) as found:
        time.sleep(HELD_S)
        return f"{len(found):,} at once"


def slow(port: int, count: int) -> str:
    with connections(port, min(count, 500)) as found:
        for at in range(SLOW_BYTES):
            for sock in found:
                with contextlib.suppress(OSError):
                    sock.sendall(b"GET / "[at : at + 1])
            time.sleep(1.0)
        return f"{len(found):,} at once"


def saying(port: int, words: Callable[[random.Random], bytes], times: int = 50) -> str:
    """Each connection sends something, and its end is looked at."""
    dice, ends = random.Random(port), Counter[str]()
    for _ in range(times):
        sock = connect(port)
        if sock is None:
            ends["not taken"] += 1
            continue
        with sock:
            with contextlib.suppress(OSError):
                sock.sendall(words(dice))
                sock.shutdown(socket.SHUT_WR)
            ends[end_of(sock)] += 1
    return ", ".join(f"{count} {what}" for what, count in ends.items())


def garbage(dice: random.Random) -> bytes:
    return dice.choice((b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02", b"")) + dice.randbytes(4096)


def hello(version: int | None = None) -> bytes:
    made = frame(Opcode.HELLO, encode_message(Hello("control", secrets.token_hex(16), new_nonce())))
    return made if version is None else made[:3] + bytes((version,)) + made[4:]


def other_token(port: int, count: int) -> str:
    key, ends = derive_key("another token of that length"), Counter[str]()
    for _ in range(20):
        sock = connect(port)
        if sock is None:
            ends["not taken"] += 1
            continue
        with sock:
            try:
                greet(sock, key, secrets.token_hex(16), "control")
                ends["TAKEN"] += 1
            except Exception as error:  # noqa: BLE001  counted
                ends[type(error).__name__] += 1
    return ", ".join(f"{times} {what}" for what, times in ends.items())


def recorded(port: int, count: int) -> str:
    """A handshake that was overheard is said once more."""
    key, said = derive_key(TOKEN), encode_message(Hello("data", secrets.token_hex(16), new_nonce()))
    proof = b""
    for attempt in range(2):
        sock = connect(port)
        if sock is None:
            return "not taken"
        with sock:
            sock.sendall(frame(Opcode.HELLO, said))
            try:
                header = read_header(exactly(sock, HEADER_BYTES))
                challenge = exactly(sock, header.nbytes)
                proof = proof or frame(Opcode.PROOF, encode_message(prove(key, "caller", said, challenge)))
                sock.sendall(proof)
                answered = read_header(exactly(sock, HEADER_BYTES)).opcode
            except Exception as error:  # noqa: BLE001  other ports do not speak so
                return type(error).__name__
        if attempt:
            return f"{answered.name} the second time"
    raise AssertionError


def exactly(sock: socket.socket, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        part = sock.recv(nbytes - len(data))
        if not part:
            raise ConnectionError("closed")
        data += part
    return data


def insider(port: int, count: int) -> str:
    """Knows the token, and then sends garbage."""
    key, dice, ends = derive_key(TOKEN), random.Random(0), Counter[str]()
    for kind in ("data", "control", "data", "control"):
        sock = connect(port)
        if sock is None:
            ends["not taken"] += 1
            continue
        with sock:
            try:
                greet(sock, key, secrets.token_hex(16), kind)
                sock.sendall(dice.randbytes(4096))
                ends[f"welcome, then {end_of(sock)}"] += 1
            except Exception as error:  # noqa: BLE001  counted
                ends[type(error).__name__] += 1
    return ", ".join(f"{times} {what}" for what, times in ends.items())


def datagrams(port: int) -> str:
    dice = random.Random(0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _ in range(5000):
            sock.sendto(dice.randbytes(dice.randrange(1, 1400)), (HOST, port))
    return "5,000"


ATTACKS: dict[str, Callable[[int, int], str]] = {
    "silent": silent,
    "a byte a second": slow,
    "garbage": lambda port, count: saying(port, garbage),
    "half a frame": lambda port, count: saying(port, lambda dice: hello()[: dice.randrange(1, 90)]),
    "another token": other_token,
    "a recorded handshake": recorded,
    "another version": lambda port, count: saying(port, lambda dice: hello(2)),
    "the token, then garbage": insider,
}


def besiege(home: Path, options: argparse.Namespace, console: Console) -> list[str]:
    """What went wrong."""
    at_home = ("--cluster-interface", HOST)
    ports = ("--port", "0", "--metrics-port", "0", "--cluster-port", "0")
    master = Program(home / "master", "--api", "--cluster-master", *at_home, *ports, "--devices", "cpu=1GiB")
    running = [master]
    try:
        api = int(master.says(r"API +http://127\.0\.0\.1:(\d+)/v1")[1])
        at = master.says(r"workers are accepted at\s+(127\.0\.0\.1:\d+)")[1]
        join = ("--cluster-worker", *at_home, "--cluster-worker-port", "0", "--devices", "cpu=1GiB")
        worker = Program(home / "desk", *join, "--cluster-name", "desk", VRM_CLUSTER_MASTER=at)
        running.append(worker)
        wait(lambda: len(ask(api, "/api/nodes")["nodes"]) == 2, "the worker", START_S)
        ask(api, "/api/pipeline/place", {"devices": "cpu=1GiB,desk/cpu", "placement": "balanced"})
        client = Client(api)
        before = {each: each.held() for each in running}
        table = Table(title="Attacks")
        for name in ("port", "of", "attack", "what came of it"):
            table.add_column(name)
        for name, program in (("master", master), ("worker", worker)):
            for port in program.ports():
                for attack, make in ATTACKS.items():
                    table.add_row(str(port), name, attack, make(port, options.connections))
        table.add_row(at.rpartition(":")[2], "master", "datagrams", datagrams(int(at.rpartition(":")[2])))
        client.close()
        console.print(table)
        console.print(f"{client.answers} answers meanwhile, the longest took {client.longest_s:.2f} s")
        bad = [f"a wrong answer: {each}" for each in client.wrong[:3]]
        bad += [f"a process has ended: {each.said[-2000:]}" for each in running if each.process.poll() is not None]
        began_s = time.monotonic()
        running.append(Program(home / "attic", *join, "--cluster-name", "attic", VRM_CLUSTER_MASTER=at))
        wait(lambda: len(ask(api, "/api/nodes")["nodes"]) == 3, "another worker", START_S)
        console.print(f"another worker has joined {time.monotonic() - began_s:.1f} s after its start")
        running.pop().close()
        wait(lambda: len(ask(api, "/api/nodes")["nodes"]) == 2, "its end", START_S)
        for each, held in before.items():
            bad += left_behind(each, held)
        bad += [f"a traceback: {each.said[-3000:]}" for each in running if "Traceback" in each.said]
        return bad
    finally:
        for each in reversed(running):
            each.close()


def left_behind(program: Program, before: dict[str, int]) -> list[str]:
    """What it has more of than before, after some time."""

    def more() -> dict[str, int]:
        now = program.held()
        return {what: now[what] - before[what] for what in now if now[what] - before[what] > SLACK[what]}

    with contextlib.suppress(TimeoutError):
        wait(lambda: not more(), "the end of what was begun", IDLE_S)
    return [f"{count} {what} more than before" for what, count in more().items()]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.siege", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--connections", type=int, default=10_000, help="at once, each port (default: %(default)s)")
    options = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    console = Console(width=140)
    print_machine(console, machine_info(), usable_cores())
    with tempfile.TemporaryDirectory() as home:
        bad = besiege(Path(home), options, console)
    for each in bad:
        console.print(each, style="red", soft_wrap=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
