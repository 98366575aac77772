"""The connection that is kept: used again, opened again, and no request takes longer than it may."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
from steering import LONGEST_WAIT_S

from core.errors import AuthenticationError, NotFoundError, UnavailableError
from vramancer.cli.live.connection import KeptClient


class State(msgspec.Struct):
    number: int = 7


@contextmanager
def talking(*talks: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that treats its first connection as the first of `talks` says, and so on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for talk in talks:
                connection, _ = listener.accept()
                with connection:
                    talk(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(LONGEST_WAIT_S)
        assert not thread.is_alive()


def answer(connection: socket.socket, body: bytes = b'{"number": 1}') -> None:
    """To the next request."""
    head = b""
    while b"\r\n\r\n" not in head:
        received = connection.recv(65536)
        if not received:
            return
        head += received
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


def hang(connection: socket.socket) -> None:
    """Until the client leaves."""
    while connection.recv(65536):
        pass


def test_one_connection_serves_many_requests() -> None:
    def thrice(connection: socket.socket) -> None:
        for _ in range(3):
            answer(connection)

    with talking(thrice) as url:
        client = KeptClient(url, None)
        assert [client.ask("/", State).number for _ in range(3)] == [1, 1, 1]
        client.close()


def test_a_server_that_closes_every_connection_is_read_to_the_end(server: Any) -> None:
    server.answers["/s"] = (200, b'{"number": 2, "more": 3}')
    client = KeptClient(server.url, "secret")
    assert [client.ask("/s", State).number for _ in range(2)] == [2, 2]
    assert [seen[2] for seen in server.seen] == ["Bearer secret"] * 2
    client.close()


def test_a_connection_that_was_closed_meanwhile_is_opened_again() -> None:
    with talking(answer, answer) as url:
        client = KeptClient(url, None)
        assert client.ask("/", State).number == 1
        assert client.ask("/", State).number == 1
        client.close()


def test_what_may_have_been_done_is_not_done_again() -> None:
    def once(connection: socket.socket) -> None:
        answer(connection)
        connection.recv(65536)

    with talking(once) as url:
        client = KeptClient(url, None)
        client.ask("/", State)
        with pytest.raises(UnavailableError, match="no answer from"):
            client.post("/", {})


def test_errors_are_the_servers_and_the_connection_lives_on(server: Any) -> None:
    server.answers["/a"] = (401, b'{"error": {"message": "The API token is wrong."}}')
    server.answers["/s"] = (200, b"{}")
    client = KeptClient(server.url, None)
    with pytest.raises(AuthenticationError, match=r"The API token is wrong\."):
        client.ask("/a", State)
    with pytest.raises(NotFoundError, match="not here"):
        client.ask("/b", State)
    assert client.ask("/s", State).number == 7
    client.close()


@pytest.mark.parametrize("body", [b"<html>", b'{"number": "x"}', b"[]", b"\xff", b""])
def test_an_answer_of_another_kind_is_named(server: Any, body: bytes) -> None:
    server.answers["/s"] = (200, body)
    with pytest.raises(UnavailableError, match="/s answers what this version does not know"):
        KeptClient(server.url, None).ask("/s", State)


def test_a_server_that_says_nothing_is_given_up() -> None:
    with talking(hang) as url:
        client = KeptClient(url, None, within_s=0.05)
        with pytest.raises(UnavailableError, match="timed out"):
            client.ask("/", State)


@pytest.mark.parametrize("said", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"])
def test_a_server_that_answers_a_byte_at_a_time_is_given_up_too(said: bytes) -> None:
    """Each of its bytes comes in time; the whole does not."""
    dripped: list[bytes] = []

    def drip(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(said)
        try:
            while True:
                connection.sendall(b"1")
                dripped.append(b"1")
                time.sleep(0.01)
        except OSError:
            return  # the client has left

    with talking(drip) as url:
        client = KeptClient(url, None, within_s=0.3)
        with pytest.raises(UnavailableError, match="timed out"):
            client.ask("/", State)
    assert dripped


def test_a_request_under_way_is_ended_from_another_thread() -> None:
    asked, failures = threading.Event(), list[str]()

    def told(connection: socket.socket) -> None:
        connection.recv(65536)
        asked.set()
        hang(connection)

    with talking(told) as url:
        client = KeptClient(url, None, within_s=LONGEST_WAIT_S)

        def ask() -> None:
            try:
                client.ask("/", State)
            except UnavailableError as error:
                failures.append(error.message)

        thread = threading.Thread(target=ask)
        thread.start()
        assert asked.wait(LONGEST_WAIT_S)
        client.end()
        thread.join(LONGEST_WAIT_S)
        assert not thread.is_alive()
        client.close()
    assert len(failures) == 1
    with pytest.raises(UnavailableError, match="not asked any more"):
        client.ask("/", State)


def test_nobody_there(server: Any) -> None:
    server.server_close()
    with pytest.raises(UnavailableError, match="no answer from"):
        KeptClient(server.url, None).ask("/s", State)
