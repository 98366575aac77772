"""Who does not know the token gets no link, and learns nothing that depends on it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
from network.door import KEY, LONGEST_S, MASTER, OTHER_KEY, WORKER, Door, left

from core.errors import ClusterRefusedError, LinkLostError, NetworkError, ProtocolError
from core.network.frames import HEADER_BYTES, Opcode, read_header
from core.network.greeting import frame, greet
from core.network.handshake import (
    Challenge,
    Hello,
    Proof,
    check_proof,
    decode_message,
    derive_key,
    encode_message,
    new_nonce,
    prove,
)
from core.network.listener import MAX_GREETING


@pytest.fixture
def door() -> Iterator[Door]:
    opened = Door()
    yield opened
    opened.close()


def test_both_know_the_token(door: Door) -> None:
    with door.connect() as sock:
        assert greet(sock, KEY, WORKER, "control") == MASTER
        door.wait_for(1)
    ((hello, address),) = door.welcomed
    assert (hello.kind, hello.node, address) == ("control", WORKER, "127.0.0.1")


def test_a_caller_with_another_token_is_told_so_and_gets_nothing_else(door: Door) -> None:
    with door.connect() as sock, pytest.raises(ClusterRefusedError, match="another cluster token"):
        greet(sock, OTHER_KEY, WORKER, "control")
    with door.connect() as sock:
        greet(sock, KEY, WORKER, "control")
        door.wait_for(1)
    assert len(door.welcomed) == 1


def test_a_listener_with_another_token_is_noticed() -> None:
    """It lets anyone in, but cannot prove that it knows the token."""
    ours, theirs = socket.socketpair()
    failed: Future[NetworkError] = Future()

    def call() -> None:
        with pytest.raises(ClusterRefusedError) as caught:
            greet(ours, KEY, WORKER, "data", timeout_s=LONGEST_S)
        failed.set_result(caught.value)

    thread = threading.Thread(target=call)
    thread.start()
    with ours, theirs:
        hello = receive(theirs, Opcode.HELLO)
        challenge = encode_message(Challenge(MASTER, new_nonce()))
        theirs.sendall(frame(Opcode.CHALLENGE, challenge))
        receive(theirs, Opcode.PROOF)
        theirs.sendall(frame(Opcode.WELCOME, encode_message(prove(OTHER_KEY, "listener", hello, challenge))))
        assert "another cluster token" in failed.result(LONGEST_S).message
    thread.join()


def receive(sock: socket.socket, opcode: Opcode) -> bytes:
    sock.settimeout(LONGEST_S)
    header = read_header(exactly(sock, HEADER_BYTES))
    assert header.opcode is opcode
    return exactly(sock, header.nbytes)


def exactly(sock: socket.socket, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        part = sock.recv(nbytes - len(data))
        assert part, data
        data += part
    return data


def test_a_recorded_handshake_proves_nothing(door: Door) -> None:
    hello = encode_message(Hello("control", WORKER, new_nonce()))
    with door.connect() as sock:
        sock.sendall(frame(Opcode.HELLO, hello))
        challenge = receive(sock, Opcode.CHALLENGE)
        proof = frame(Opcode.PROOF, encode_message(prove(KEY, "caller", hello, challenge)))
        sock.sendall(proof)
        receive(sock, Opcode.WELCOME)
    with door.connect() as sock:
        sock.sendall(frame(Opcode.HELLO, hello))
        assert receive(sock, Opcode.CHALLENGE) != challenge
        sock.sendall(proof)
        assert b"another cluster token" in receive(sock, Opcode.REFUSED)
        assert sock.recv(1) == b""
    assert len(door.welcomed) == 1


def test_a_proof_sent_back_to_whoever_made_it_is_none() -> None:
    hello, challenge = b"hello", b"challenge"
    own = prove(KEY, "caller", hello, challenge)
    with pytest.raises(ClusterRefusedError):
        check_proof(own, KEY, "listener", hello, challenge)
    check_proof(own, KEY, "caller", hello, challenge)
    for other in ((b"hello!", challenge), (hello, b"challenge!")):
        with pytest.raises(ClusterRefusedError):
            check_proof(own, KEY, "caller", *other)


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n" + b" " * 64,
        b"\0" * 64,
        frame(Opcode.PROOF, encode_message(Proof(bytes(32)))),
        frame(Opcode.HELLO, b"no message"),
        frame(Opcode.HELLO, encode_message(Hello("control", WORKER, bytes(8)))),
        frame(Opcode.HELLO, encode_message(Hello("control", "../../etc", bytes(32)))),
        frame(Opcode.HELLO, b"\x83\xa4ki\x9ed"),  # no UTF-8
        frame(Opcode.HEARTBEAT, b""),
    ],
)
def test_whoever_says_something_else_is_left(door: Door, said: bytes) -> None:
    with door.connect() as sock:
        sock.sendall(said)
        assert left(sock)
    assert not door.welcomed


def test_half_a_frame_and_silence_keep_nobody_out(door: Door) -> None:
    silent = [door.connect() for _ in range(MAX_GREETING + 20)]
    silent[0].sendall(frame(Opcode.HELLO, encode_message(Hello("control", WORKER, new_nonce())))[:70])
    try:
        with door.connect() as sock:
            greet(sock, KEY, WORKER, "control", timeout_s=LONGEST_S)
            door.wait_for(1)
        assert left(silent[0]), "the oldest made room"
    finally:
        for sock in silent:
            sock.close()


def test_a_caller_that_proved_itself_may_still_be_refused() -> None:
    async def admit(hello: Hello, address: str) -> None:
        raise ClusterRefusedError(f"{hello.kind} from {address}: the master runs Python 3.12, this node 3.10")

    closed = Door(admit)
    try:
        with (
            closed.connect() as sock,
            pytest.raises(ClusterRefusedError, match=r"control from 127\.0\.0\.1: the master"),
        ):
            greet(sock, KEY, WORKER, "control")
        assert not closed.welcomed
    finally:
        closed.close()


def test_a_listener_that_says_nothing_is_not_waited_for_long() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(LinkLostError, match=r"no answer within 0\.05 s"):
        greet(ours, KEY, WORKER, "control", timeout_s=0.05)


def test_a_short_token_is_none() -> None:
    with pytest.raises(ValueError, match="at least 16 characters"):
        derive_key("short")


def test_messages_are_what_they_should_be() -> None:
    for wrong in (
        encode_message(Challenge(MASTER, new_nonce())),
        b"\x81\xa3m\xe2c\x00",
        b"\x81\xa3mac" + b"\x91" * 100_000,
    ):
        with pytest.raises(ProtocolError, match="a Proof cannot be read"):
            decode_message(wrong, Proof)
