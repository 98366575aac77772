"""A master is found by mDNS, and by broadcast. On loopback; other tests' masters are found too, on other ports."""

from __future__ import annotations

import queue
import socket
import threading
import time
import uuid
from collections.abc import Iterator

import msgspec
import pytest

from core.network import discovery
from core.network.discovery import Advertiser, Found, addresses, cluster_port_of, masters

HOST = "127.0.0.1"
NODE = uuid.uuid4().hex
"""Names on a network are unique, also where these tests run several times at once."""
LONGEST_S = 60.0


def free_port() -> int:
    """Free for TCP and UDP, a moment ago."""
    while True:
        with socket.create_server((HOST, 0)) as server, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            port: int = server.getsockname()[1]
            try:
                other.bind(("", port))
            except OSError:
                continue
            return port


@pytest.fixture
def port() -> Iterator[int]:
    number = free_port()
    advertiser = Advertiser([HOST], number, NODE)
    yield number
    advertiser.close()


def find(port: int, how: str) -> Found:
    looking = masters(port, LONGEST_S, [HOST])
    try:
        return next(found for found in looking if found.port == port and found.how == how)
    finally:
        looking.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", ["mdns", "broadcast"])
def test_a_master_is_found(port: int, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "mdns":
        monkeypatch.setattr(discovery, "_QUESTION", b"another question")
        monkeypatch.setattr(discovery, "_ask", lambda *_: None)
    else:
        monkeypatch.setattr(discovery, "SERVICE", "_nothing._tcp.local.")
    assert find(port, how)[:2] == (HOST, port)


def test_each_is_named_once_and_looking_ends(port: int) -> None:
    found = [each for each in masters(port, 1.5, [HOST]) if each.port == port]
    assert len(found) <= 1


def test_a_master_that_has_gone_is_not_found() -> None:
    number = free_port()
    Advertiser([HOST], number, NODE).close()
    assert not [each for each in masters(number, 1.0, [HOST]) if each.port == number]


def ask(port: int, question: bytes, times: int = 1, *, wait_s: float = LONGEST_S) -> list[bytes]:
    """Answers: the first may take `wait_s`, those after it follow."""
    answers = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(wait_s)
        for _ in range(times):
            sock.sendto(question, (HOST, port))
        try:
            while True:
                answers.append(sock.recv(1024))
                sock.settimeout(0.5)
        except TimeoutError:
            return answers


def test_what_is_answered_and_what_is_not(port: int) -> None:
    assert ask(port, b"what else is there?", wait_s=0.5) == []
    assert ask(port, discovery._QUESTION + b"!", wait_s=0.5) == []
    (answer,) = ask(port, discovery._QUESTION)
    assert msgspec.msgpack.decode(answer) == {"port": port, "node": NODE, "tls": False}


def test_a_flood_of_questions_is_not_answered_one_by_one(port: int) -> None:
    began_s = time.monotonic()
    answers = ask(port, discovery._QUESTION, 1000)
    assert 1 <= len(answers) <= (time.monotonic() - began_s + 2) * discovery._ANSWERS_PER_S


def test_answers_that_cannot_be_read_are_left() -> None:
    """From whoever answers broadcasts with something else."""
    number = free_port()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("", number))
        said = [b"nonsense", b"\x82\xa4por\xe2", msgspec.msgpack.encode({"port": 0, "node": NODE})]
        said += [msgspec.msgpack.encode({"port": number, "node": NODE})]

        def answer() -> None:
            _, address = sock.recvfrom(1024)
            for each in said:
                sock.sendto(each, address)

        thread = threading.Thread(target=answer)
        thread.start()
        assert find(number, "broadcast") == Found(HOST, number, "broadcast")
        thread.join()


def test_this_machine_s_addresses() -> None:
    assert addresses()[HOST][1] == "127.255.255.255"


def test_a_port_that_is_taken_leaves_nothing_open(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "SO_REUSEADDR", socket.SO_KEEPALIVE)  # or the port could be shared
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("", 0))
        with pytest.raises(OSError, match="in use"):
            Advertiser([HOST], sock.getsockname()[1], NODE)


def test_an_address_that_has_gone_is_left_out(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    known = addresses()
    stopped = threading.Event()
    found: queue.SimpleQueue[Found] = queue.SimpleQueue()
    thread = threading.Thread(target=discovery._ask, args=(port, ["192.0.2.1", HOST], known, found, stopped))
    thread.start()
    assert found.get(timeout=LONGEST_S) == Found(HOST, port, "broadcast")
    stopped.set()
    thread.join()


@pytest.mark.parametrize(
    ("said", "found"),
    [
        (b'{"status": "alive", "cluster_port": 5040}', 5040),
        (b'{"status": "alive"}', None),
        (b'{"cluster_port": 70000}', None),
        (b'{"cluster_port": "many"}', None),
        (b"<html>", None),
        (b"", None),
    ],
)
def test_an_api_tells_where_its_master_is(said: bytes, found: int | None) -> None:
    with socket.create_server((HOST, 0)) as server:
        asked: list[bytes] = []

        def answer() -> None:
            sock, _ = server.accept()
            with sock:
                asked.append(sock.recv(4096))
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(said), said))

        thread = threading.Thread(target=answer)
        thread.start()
        assert cluster_port_of(HOST, server.getsockname()[1]) == found
        thread.join()
    assert asked[0].startswith(b"GET /live HTTP/1.1\r\n")


def test_what_is_no_api_is_no_master() -> None:
    assert cluster_port_of(HOST, free_port()) is None
    with socket.create_server((HOST, 0)) as server:

        def hang_up() -> None:
            server.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        assert cluster_port_of(HOST, server.getsockname()[1]) is None
        thread.join()
