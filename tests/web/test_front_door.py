"""Clients that are slow, silent, greedy or wrong cost nobody else anything."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import pytest
from front_doors import front_door
from steering import LONGEST_WAIT_S, until

from core.security.admission import DISCONNECTED_KEY, REFUSAL_KEY, REFUSED, STOPPING_KEY, Admission
from vramancer.web import bridge
from vramancer.web.bridge import QUICK_THREADS

SOON_S = 0.3
PUBLIC = b"GET /public HTTP/1.1\r\nHost: x\r\n\r\n"


class Panic(BaseException):
    """What pyo3 raises for a panic of Rust code is no Exception either."""


def lines(name: bytes) -> Iterator[bytes]:
    """A long answer in many pieces of which each says whose it is."""
    return (b"%s %06d %s\n" % (name, number, b"." * (number % 4000)) for number in range(1500))


class App:
    """A small WSGI application. `/held` streams until `let_go`, `/flood` as fast as it can, `/echo` gives the body
    back, `/panic` raises what is no Exception."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.closed = threading.Semaphore(0)
        self.running = 0
        self._lock = threading.Lock()

    def admit(self, environ: Any) -> Admission:
        if environ["PATH_INFO"] == "/secret":
            return REFUSED
        return Admission(
            granted=True, waits=not environ["PATH_INFO"].startswith("/quick"), public=environ["PATH_INFO"] == "/public",
            manages=environ["PATH_INFO"] == "/manage",
        )  # fmt: skip

    def __call__(self, environ: Any, start_response: Callable[..., Any]) -> Iterable[bytes]:
        path, refusal = environ["PATH_INFO"], environ.get(REFUSAL_KEY)
        if refusal is not None or path == "/secret":
            status, body = ("401 x", b"secret") if refusal is None else (f"{refusal.status} x", str(refusal).encode())
            start_response(status, [("Content-Length", str(len(body)))])
            return [body]
        if path == "/panic":
            raise Panic
        if path == "/quick/large":
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [b"x" * 200_000] * 50
        if path.startswith("/lines/"):
            start_response("200 OK", [("Content-Type", "text/plain")])
            return lines(path.removeprefix("/lines/").encode())
        if path in ("/held", "/flood"):
            start_response("200 OK", [("Content-Type", "text/plain")])
            return self._stream(environ, flood=path == "/flood")
        body = environ["wsgi.input"].read()
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
        return [body]

    def _stream(self, environ: Any, *, flood: bool) -> Iterator[bytes]:
        with self._lock:
            self.running += 1
        try:
            yield b"first\n"
            while not environ[DISCONNECTED_KEY]() and (flood or not self.let_go.wait(0.01)):
                if flood:
                    yield b"x" * 65536
            yield b"last\n"
        finally:
            with self._lock:
                self.running -= 1
            self.closed.release()


@pytest.fixture
def app() -> Iterator[App]:
    app = App()
    yield app
    app.let_go.set()


@contextmanager
def opened(app: App, **limits: Any) -> Iterator[int]:
    with front_door(app, app.admit, **limits) as (port, _):
        try:
            yield port
        finally:
            app.let_go.set()


def connect(port: int, data: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=LONGEST_WAIT_S)
    connection.sendall(data)
    return connection


def get(port: int, path: str, **request: Any) -> tuple[int, bytes]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=LONGEST_WAIT_S)) as connection:
        connection.request(request.pop("method", "GET"), path, **request)
        response = connection.getresponse()
        return response.status, response.read()


def read_all(connection: socket.socket) -> bytes:
    data = b""
    try:
        while piece := connection.recv(65536):
            data += piece
    except ConnectionResetError:
        pass
    return data


def read_until(connection: socket.socket, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end):
        piece = connection.recv(65536)
        assert piece, data
        data += piece
    return data


STALLS = {
    "nothing": b"",
    "one byte": b"G",
    "half a head": b"GET /public HTTP/1.1\r\nHos",
    "a body without a token": b"POST /secret HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nab",
    "a body": b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nab",
    "a chunk": b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
}


@pytest.mark.parametrize("stall", STALLS)
def test_clients_that_stall_hold_up_nobody(app: App, stall: str) -> None:
    with opened(app, max_waiting=4) as port, ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(connect(port, STALLS[stall]))
        assert get(port, "/public") == (200, b"")
        if stall not in ("a body", "a chunk"):
            assert get(port, "/echo", method="POST", body=b"through") == (200, b"through")


@pytest.mark.parametrize(
    ("stall", "answer"),
    [("nothing", b""), ("half a head", b"408"), ("a body", b"408"), ("a chunk", b"408"), ("kept alive", b"200")],
)
def test_each_stall_has_its_deadline(app: App, stall: str, answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vramancer.web.protocol.KEEPALIVE_S", SOON_S)
    with (
        opened(app, header_timeout_s=SOON_S, body_timeout_s=SOON_S) as port,
        connect(port, STALLS.get(stall, PUBLIC)) as connection,
    ):
        assert read_all(connection).partition(b" ")[2][:3] == answer


def test_a_head_that_trickles_has_no_more_time_than_another(app: App) -> None:
    with opened(app, header_timeout_s=SOON_S) as port, connect(port, b"GET / HTTP/1.1\r\n") as connection:
        deadline_s = time.monotonic() + LONGEST_WAIT_S
        try:
            while time.monotonic() < deadline_s:
                connection.sendall(b"X-Slow: y\r\n")
                time.sleep(0.05)
        except OSError:
            return
    pytest.fail("it could go on for ever")


def test_a_refused_body_is_answered_before_it_came_and_then_dropped(app: App) -> None:
    head = b"POST /secret HTTP/1.1\r\nHost: x\r\nContent-Length: 300000\r\n\r\n"
    with opened(app) as port, connect(port, head) as connection, connection.makefile("rb") as answer:
        assert answer.readline() == b"HTTP/1.1 401 Unauthorized\r\n"
        connection.sendall(b"x" * 300_000 + PUBLIC)
        while not (line := answer.readline()).endswith(b"HTTP/1.1 200 OK\r\n"):
            assert line, "the connection should go on with the next request"


def test_a_refused_body_is_not_waited_for_for_ever(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vramancer.web.protocol.DISCARD_S", SOON_S)
    with opened(app) as port, connect(port, STALLS["a body without a token"]) as connection:
        assert read_all(connection).endswith(b"secret")


def test_nothing_is_expected_of_a_refused_client_that_asks_first(app: App) -> None:
    head = b"POST /%s HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    with opened(app) as port:
        with connect(port, head % b"secret") as connection:
            assert read_all(connection).startswith(b"HTTP/1.1 401")
        with connect(port, head % b"echo") as connection, connection.makefile("rb") as answer:
            assert answer.readline() == b"HTTP/1.1 100 Continue\r\n"
            connection.sendall(b"ab")
            assert answer.readline() == b"\r\n"
            assert answer.readline() == b"HTTP/1.1 200 OK\r\n"


def test_clients_that_never_read_are_gone_after_a_while(app: App) -> None:
    with opened(app, write_timeout_s=SOON_S) as port, ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(connect(port, b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n"))
        for _ in range(20):
            assert app.closed.acquire(timeout=LONGEST_WAIT_S)
        assert get(port, "/public")[0] == 200


def test_what_is_beyond_the_limit_is_told_so_at_once(app: App) -> None:
    with opened(app, max_waiting=3) as port, ExitStack() as stack:
        for _ in range(3):
            connection = stack.enter_context(connect(port, b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n"))
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        status, body = get(port, "/held")
        assert status == 429
        assert b"3 requests are under way" in body
        for path in ("/quick", "/public", "/manage"):
            assert get(port, path)[0] == 200
        app.let_go.set()
        until(lambda: get(port, "/held")[0] == 200, "there is room again")


@pytest.mark.parametrize("pause_s", [0, 0.002])
def test_a_slow_reader_gets_every_byte_in_order(app: App, pause_s: float) -> None:
    with opened(app) as port, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        connection.sendall(b"GET /lines/one HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(SOON_S)  # by then more has been written than the kernel takes
        response = http.client.HTTPResponse(connection)
        response.begin()
        data = b""
        while piece := response.read(20_000):
            data += piece
            time.sleep(pause_s)
    assert data == b"".join(lines(b"one"))


def test_no_answer_strays_into_another_connection(app: App) -> None:
    """Clients come and go, so that descriptors are used again while threads still write."""
    wrong: list[str] = []

    def client(number: int) -> None:
        rng = random.Random(number)
        for turn in range(8):
            name = b"%d-%d" % (number, turn)
            with contextlib.suppress(OSError), connect(port, b"GET /lines/%s HTTP/1.1\r\n\r\n" % name) as connection:
                if rng.random() < 0.5:
                    connection.recv(rng.randrange(1, 50_000))
                    continue
                response = http.client.HTTPResponse(connection)
                response.begin()
                if response.read() != b"".join(lines(name)):
                    wrong.append(name.decode())

    with opened(app) as port:
        clients = [threading.Thread(target=client, args=(number,)) for number in range(12)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join(LONGEST_WAIT_S)
    assert wrong == []


def test_a_body_for_what_is_public_is_not_even_held(app: App) -> None:
    """Nobody without a token fills the memory that others' bodies need."""
    stalled = b"GET /public HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" + b"x" * 999
    with opened(app, max_body_bytes=1000) as port, ExitStack() as stack:
        for _ in range(20):
            connection = stack.enter_context(connect(port, stalled))
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        assert get(port, "/echo", method="POST", body=b"x" * 1000) == (200, b"x" * 1000)


def test_a_quick_answer_that_nobody_reads_holds_no_thread(app: App) -> None:
    with opened(app) as port, ExitStack() as stack:
        for _ in range(4 * QUICK_THREADS):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", port))
            connection.sendall(b"GET /quick/large HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        assert get(port, "/public")[0] == 200


def test_what_comes_while_an_answer_is_under_way_has_no_deadline(app: App) -> None:
    """Old clients put a line break behind a body."""
    request = b"POST /held HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nab"
    with opened(app, header_timeout_s=SOON_S) as port, connect(port, request) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        connection.sendall(b"\r\n")
        time.sleep(3 * SOON_S)
        app.let_go.set()
        assert b"last" in read_until(connection, b"0\r\n\r\n")


def test_the_next_request_of_a_connection_is_watched_though_the_last_one_has_not_ended(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    deliver = bridge._deliver

    async def late(*arguments: Any) -> None:
        await deliver(*arguments)
        await asyncio.sleep(SOON_S)

    monkeypatch.setattr(bridge, "_deliver", late)
    with opened(app) as port:
        connection = connect(port, b"GET /quick HTTP/1.1\r\nHost: x\r\n\r\n")
        read_until(connection, b"\r\n\r\n")
        connection.sendall(b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n")
        read_until(connection, b"first\n\r\n")
        time.sleep(2 * SOON_S)
        connection.close()
        assert app.closed.acquire(timeout=10)


def test_a_client_that_leaves_is_noticed_without_a_word(app: App) -> None:
    with opened(app) as port:
        connection = connect(port, b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(100)
        connection.close()
        assert app.closed.acquire(timeout=LONGEST_WAIT_S)


def test_too_many_connections_push_out_the_idlest(app: App) -> None:
    forever_s = 10 * LONGEST_WAIT_S  # so that no deadline does it
    with opened(app, max_connections=16, header_timeout_s=forever_s) as port, ExitStack() as stack:
        held = stack.enter_context(connect(port, b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n"))
        assert held.recv(100)
        idle = [stack.enter_context(connect(port)) for _ in range(40)]
        assert get(port, "/public")[0] == 200
        idle[0].settimeout(LONGEST_WAIT_S / 4)
        assert idle[0].recv(1) == b""
        app.let_go.set()
        assert b"last" in read_until(held, b"0\r\n\r\n")


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n" % (b"a" * 9000), 414),
        (b"GET /%s" % (b"a" * 100_000), 414),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX-Big: %s\r\n\r\n" % (b"a" * 70_000), 431),
        (b"GET / HTTP/1.1\r\n" + b"X-Many: y\r\n" * 20_000 + b"\r\n", 431),
        (b"NONSENSE\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    ],
)
def test_what_is_no_request_is_told_so_in_openais_shape(app: App, request_bytes: bytes, status: int) -> None:
    with opened(app) as port, connect(port, request_bytes) as connection:
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d" % status)
        assert json.loads(body)["error"]["type"] == "invalid_request_error"
        assert get(port, "/public")[0] == 200


def test_a_body_that_breaks_off_is_no_request(app: App) -> None:
    with opened(app) as port:
        connect(port, STALLS["a body"]).close()
        assert get(port, "/echo", method="POST", body=b"x" * 100_000) == (200, b"x" * 100_000)


def test_bodies_come_in_any_cut(app: App) -> None:
    body = b"".join(b"%05d" % number for number in range(50_000))
    with opened(app) as port:
        assert get(port, "/echo", method="POST", body=body) == (200, body)
        pieces = iter([body[:1], body[1:70_000], body[70_000:]])
        assert get(port, "/echo", method="POST", body=pieces) == (200, body)


def test_all_bodies_together_are_bounded(app: App) -> None:
    limit = 1000
    head = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    with opened(app, max_body_bytes=limit) as port, ExitStack() as stack:
        waiting = [stack.enter_context(connect(port, head + b"x" * 900)) for _ in range(18)]
        until(lambda: get(port, "/echo", method="POST", body=b"x" * limit)[0] == 503, "no more are held")
        for connection in waiting:
            connection.close()
        until(lambda: get(port, "/echo", method="POST", body=b"x" * limit)[0] == 200, "there is room again")


def test_no_exception_of_any_kind_ends_more_than_its_request(app: App) -> None:
    with opened(app) as port:
        status, body = get(port, "/panic")
        assert (status, json.loads(body)["error"]["code"]) == (500, "internal_error")
        assert get(port, "/public")[0] == 200


def test_stopping_refuses_bodies_that_are_still_coming(app: App) -> None:
    with front_door(app, app.admit) as (port, door), connect(port, STALLS["a body"]) as connection:
        held = connect(port, b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n")
        assert held.recv(100)
        door.stop()
        assert read_until(connection, b"stopping.").startswith(b"HTTP/1.1 503")
        assert get(port, "/echo")[0] == 503
        assert get(port, "/public")[0] == 200
        app.let_go.set()
        assert b"last" in read_until(held, b"0\r\n\r\n")
        held.close()


def test_the_application_is_told_that_the_server_is_stopping(app: App) -> None:
    told = []

    def listening(environ: Any, start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/public":
            told.append(environ[STOPPING_KEY])
        return app(environ, start_response)

    with front_door(listening, app.admit) as (port, door), connect(port, b"GET /held HTTP/1.1\r\n\r\n") as held:
        assert held.recv(100)
        assert get(port, "/public")[0] == 200
        door.stop()
        until(lambda: get(port, "/echo")[0] == 503, "it stops")
        assert get(port, "/public")[0] == 200
        app.let_go.set()
        read_until(held, b"0\r\n\r\n")
    assert (told[0], told[-1]) == (False, True)


def test_a_kept_alive_connection_waits_for_no_delayed_acknowledgement(app: App) -> None:
    accepted = []
    with front_door(app, app.admit) as (port, door), connect(port, PUBLIC) as connection:
        assert connection.recv(10)
        for protocol in door.server_state.connections:
            ours = protocol.transport.get_extra_info("socket")
            accepted.append(ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
    assert accepted == [1] or (len(accepted) == 1 and accepted[0])
