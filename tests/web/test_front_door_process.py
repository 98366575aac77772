"""The front door in a process of its own, with a small application: streaming, draining, signals, addresses."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from steering import LONGEST_WAIT_S, until

from core.errors import ConfigError
from vramancer.web.listener import bind_socket, listen

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")

PROGRAM = """
import os, sys, threading
from core.security.admission import Admission
from vramancer.web.leave import leave
from vramancer.web.limits import Limits
from vramancer.web.listener import bind_socket, listen
from vramancer.web.server import FrontDoor

def app(environ, start_response):
    if "vramancer.refusal" in environ:
        start_response("503 Service Unavailable", [("Content-Length", "0")])
        return []
    start_response("200 OK", [("Content-Type", "text/plain")])
    return stream(environ["PATH_INFO"] == "/endless")

def stream(endless):
    try:
        yield b"first\\n"
        while endless and not told.wait(0.05):
            yield b"more\\n"
        yield b"last\\n"
    finally:
        print("closed", flush=True)

def admit(environ):
    return Admission(granted=True, waits=True, public=environ["PATH_INFO"] == "/public")

told = threading.Event()
threading.Thread(target=lambda: os.read(0, 1) and told.set(), daemon=True).start()

limits = Limits(100, 1000, 4, 10.0, 10.0, 10.0, drain_timeout_s=float(sys.argv[1]))
listener = bind_socket("127.0.0.1", 0)
listen(listener, 100)
FrontDoor(app, admit, limits, lambda: print(listener.getsockname()[1], flush=True)).run_until_stopped(listener)
print("drained", flush=True)
sys.exit(leave(0, grace_s=0.2))
"""


class Served:
    """A running server process. Its answer at `/endless` goes on until it is told to end. It is killed when it runs far
    too long, so that what waits for it in vain fails."""

    def __init__(self, drain_timeout_s: float) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("VRM_")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(drain_timeout_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env=environment,
        )
        assert self.process.stdout is not None
        self._watchdog = threading.Timer(LONGEST_WAIT_S, self.process.kill)
        self._watchdog.start()
        self._connections: list[http.client.HTTPConnection] = []
        self.port = int(self.process.stdout.readline())

    def get(self, path: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LONGEST_WAIT_S)
        self._connections.append(connection)
        connection.request("GET", path)
        return connection.getresponse()

    def hang_up(self) -> None:
        """Leave in the middle of an answer."""
        for connection in self._connections:
            if connection.sock is not None:
                connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()

    def status_of(self, path: str) -> int:
        response = self.get(path)
        response.read()
        return response.status

    def stop(self, number: int = signal.SIGINT) -> None:
        self.process.send_signal(number)

    def tell(self) -> None:
        """Endless answers end."""
        assert self.process.stdin is not None
        self.process.stdin.write("end\n")
        self.process.stdin.flush()

    def heard_of_stopping(self) -> None:
        """Wait until it has said that it stops."""
        assert self.process.stderr is not None
        while "once more to exit at once" not in (line := self.process.stderr.readline()):
            assert line, "it ended without a word"

    def finish(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=LONGEST_WAIT_S)
        return self.process.returncode, out, err

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        self._watchdog.cancel()
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


Start = Callable[..., Served]


@pytest.fixture
def start() -> Iterator[Start]:
    running: list[Served] = []

    def run(drain_timeout_s: float = 2 * LONGEST_WAIT_S) -> Served:
        running.append(Served(drain_timeout_s))
        return running[-1]

    yield run
    for served in running:
        served.close()


def test_answers_stream_as_they_are_made(start: Start) -> None:
    served = start()
    response = served.get("/endless")
    assert response.readline() == b"first\n"
    served.tell()
    assert response.read().endswith(b"last\n")
    assert response.getheader("Transfer-Encoding") == "chunked"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_lets_running_requests_finish(start: Start, number: int) -> None:
    served = start()
    response = served.get("/endless")
    assert response.readline() == b"first\n"
    served.stop(number)
    served.heard_of_stopping()
    until(lambda: served.status_of("/new") == 503, "new requests are refused")
    assert served.status_of("/public") == 200
    served.tell()
    assert response.read().endswith(b"last\n")
    status, out, err = served.finish()
    assert status == 0 and out.endswith("closed\ndrained\n")
    assert "Traceback" not in err


def test_draining_ends_after_its_time(start: Start) -> None:
    served = start(drain_timeout_s=1)
    response = served.get("/endless")
    assert response.readline() == b"first\n"
    started_s = time.monotonic()
    served.stop()
    status, out, _ = served.finish()
    assert time.monotonic() - started_s > 0.9
    assert status == 0
    assert out.endswith("drained\n")


def test_the_second_signal_exits_at_once(start: Start) -> None:
    served = start()
    response = served.get("/endless")
    assert response.readline() == b"first\n"
    served.stop()
    served.heard_of_stopping()
    assert response.readline() == b"more\n"
    served.stop()
    assert served.finish()[0] == 130


def test_a_signal_right_after_the_start_is_handled(start: Start) -> None:
    served = start()
    served.stop(signal.SIGTERM)
    assert served.finish()[:2] == (0, "drained\n")


def test_an_idle_server_stops_soon(start: Start) -> None:
    served = start()
    served.get("/").read()  # leaves a kept-alive connection behind
    served.stop(signal.SIGTERM)
    assert served.finish()[0] == 0


def test_a_client_that_leaves_ends_its_answer(start: Start) -> None:
    served = start()
    response = served.get("/endless")
    assert response.readline() == b"first\n"
    response.close()
    served.hang_up()
    assert served.process.stdout is not None
    assert served.process.stdout.readline() == "closed\n"


def test_a_stuck_client_does_not_keep_the_process(start: Start) -> None:
    served = start(drain_timeout_s=1)
    with socket.create_connection(("127.0.0.1", served.port)) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Le")  # and nothing more
        time.sleep(0.3)
        served.stop()
        assert served.finish()[0] == 0


def test_an_address_in_use_is_named() -> None:
    with bind_socket("127.0.0.1", 0) as first:
        listen(first, 10)
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} is in use by another program"):
            bind_socket("127.0.0.1", port)


def test_two_servers_that_bound_at_once_cannot_both_listen() -> None:
    with bind_socket("127.0.0.1", 0) as first:
        try:
            second = bind_socket("127.0.0.1", first.getsockname()[1])
        except ConfigError:
            pytest.skip("this system refuses to bind twice already")
        with second:
            listen(first, 10)
            with pytest.raises(ConfigError, match="in use"):
                listen(second, 10)


def test_nobody_is_answered_before_listening() -> None:
    with bind_socket("127.0.0.1", 0) as listener:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(listener.getsockname(), timeout=1)
        listen(listener, 10)
        socket.create_connection(listener.getsockname(), timeout=1).close()


@pytest.mark.parametrize(("host", "said"), [("no such host.invalid", "api.host"), ("192.0.2.1", "cannot listen on")])
def test_an_address_that_is_not_ours_is_named(host: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        bind_socket(host, 0)


def test_ipv6() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    try:
        listener = bind_socket("::1", 0)
    except ConfigError:
        pytest.skip("no IPv6 address")
    with listener:
        assert listener.family == socket.AF_INET6
