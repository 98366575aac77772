"""The web servers in a process of their own, with a small application: streaming, draining, signals, addresses."""

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
from vramancer.web_server import bind_socket, listen

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")

PROGRAM = """
import os, sys, threading
from core.config import ApiSettings
from vramancer.web_server import bind_socket, leave, listen, run_until_stopped

def app(environ, start_response):
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

told = threading.Event()
threading.Thread(target=lambda: os.read(0, 1) and told.set(), daemon=True).start()

settings = ApiSettings(server=sys.argv[1], drain_timeout_s=float(sys.argv[2]), threads=4)
listener = bind_socket("127.0.0.1", 0)
listen(listener)
run_until_stopped(app, listener, settings, lambda: print(listener.getsockname()[1], flush=True))
print("drained", flush=True)
sys.exit(leave(0, grace_s=0.2))
"""


class Served:
    """A running server process. Its answer at `/endless` goes on until it is told to end. It is killed when it runs far
    too long, so that what waits for it in vain fails."""

    def __init__(self, server: str, drain_timeout_s: float) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("VRM_")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, server, str(drain_timeout_s)],
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

    def answers_new_clients(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as client:
                client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                return bool(client.recv(1))
        except OSError:
            return False

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

    def run(server: str, drain_timeout_s: float = 2 * LONGEST_WAIT_S) -> Served:
        running.append(Served(server, drain_timeout_s))
        return running[-1]

    yield run
    for served in running:
        served.close()


both = pytest.mark.parametrize("server", ["gunicorn", "werkzeug"])


@both
def test_answers_stream_as_they_are_made(start: Start, server: str) -> None:
    served = start(server)
    response = served.get("/endless")
    assert response.readline() == b"first\n"
    served.tell()
    assert response.read().endswith(b"last\n")
    assert response.getheader("Transfer-Encoding") == "chunked"


@both
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_lets_running_requests_finish(start: Start, server: str, number: int) -> None:
    served = start(server)
    response = served.get("/endless")
    assert response.readline() == b"first\n"
    served.stop(number)
    served.heard_of_stopping()
    until(lambda: not served.answers_new_clients(), "nobody new is answered")
    served.tell()
    assert response.read().endswith(b"last\n")
    status, out, err = served.finish()
    assert status == 0 and out.endswith("closed\ndrained\n")
    assert "Traceback" not in err


@both
def test_draining_ends_after_its_time(start: Start, server: str) -> None:
    served = start(server, drain_timeout_s=1)
    response = served.get("/endless")
    assert response.readline() == b"first\n"
    started_s = time.monotonic()
    served.stop()
    status, out, _ = served.finish()
    assert time.monotonic() - started_s > 0.9
    assert status == 0
    assert out.endswith("drained\n")


@both
def test_the_second_signal_exits_at_once(start: Start, server: str) -> None:
    served = start(server)
    response = served.get("/endless")
    assert response.readline() == b"first\n"
    served.stop()
    served.heard_of_stopping()
    assert response.readline() == b"more\n"
    served.stop()
    assert served.finish()[0] == 130


@both
def test_a_signal_right_after_the_start_is_handled(start: Start, server: str) -> None:
    served = start(server)
    served.stop(signal.SIGTERM)
    assert served.finish()[:2] == (0, "drained\n")


@both
def test_an_idle_server_stops_soon(start: Start, server: str) -> None:
    served = start(server)
    served.get("/").read()  # leaves a kept-alive connection behind
    served.stop(signal.SIGTERM)
    assert served.finish()[0] == 0


@both
def test_a_client_that_leaves_ends_its_answer(start: Start, server: str) -> None:
    served = start(server)
    response = served.get("/endless")
    assert response.readline() == b"first\n"
    response.close()
    served.hang_up()
    assert served.process.stdout is not None
    assert served.process.stdout.readline() == "closed\n"


def test_a_stuck_client_does_not_keep_the_process(start: Start) -> None:
    served = start("gunicorn", drain_timeout_s=1)
    with socket.create_connection(("127.0.0.1", served.port)) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Le")  # and nothing more
        time.sleep(0.3)
        served.stop()
        assert served.finish()[0] == 0


def test_an_address_in_use_is_named() -> None:
    with bind_socket("127.0.0.1", 0) as first:
        listen(first)
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
            listen(first)
            with pytest.raises(ConfigError, match="in use"):
                listen(second)


def test_nobody_is_answered_before_listening() -> None:
    with bind_socket("127.0.0.1", 0) as listener:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(listener.getsockname(), timeout=1)
        listen(listener)
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
