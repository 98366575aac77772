"""Connections that are encrypted: what goes over them, and who gets none."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from network.door import KEY, LONGEST_S, MASTER, OTHER_KEY, WORKER, Door, left
from network.recorder import Recorder
from network.wire import Wire
from steering import until

from core.errors import ClusterRefusedError, ConfigError, LinkLostError, NetworkError, ProtocolError
from core.network import greeting
from core.network.certificates import Identity, new_identity
from core.network.connection import Connection
from core.network.frames import HEADER_BYTES, MAGIC, SUMMED_AHEAD_BYTES, Header, Opcode, read_header, write_header
from core.network.greeting import CALLER_ENCRYPTS, LISTENER_ENCRYPTS, frame, greet, introduce
from core.network.handshake import check_proof, prove
from core.network.link import Link
from core.network.listener import MAX_GREETING
from core.network.tls import RECORD_BYTES, TlsConnection, TlsEnd

pytest.importorskip("cryptography", reason="certificates are made by the extra tls")

TEXT = b"what nobody else should read"
KINDS = (Opcode.HIDDEN, Opcode.KV_PAGES, Opcode.ANSWER, Opcode.WEIGHTS)
SIZES = (0, 1, 100, RECORD_BYTES - HEADER_BYTES, RECORD_BYTES, SUMMED_AHEAD_BYTES, SUMMED_AHEAD_BYTES + 1, 3 << 20)


@pytest.fixture(scope="module")
def identity() -> Identity:
    return new_identity()


@pytest.fixture(scope="module")
def other_identity() -> Identity:
    """Of another process."""
    return new_identity()


@pytest.fixture
def door(identity: Identity) -> Iterator[Door]:
    opened = Door(identity=identity)
    yield opened
    opened.close()


@pytest.fixture
def plain_door() -> Iterator[Door]:
    opened = Door()
    yield opened
    opened.close()


@pytest.fixture
def wire(door: Door) -> Iterator[Wire]:
    between = Wire(door.listener.port)
    yield between
    between.close()


def call(port: int, identity: Identity | None, key: bytes = KEY, timeout_s: float = LONGEST_S) -> Connection:
    sock = socket.create_connection(("127.0.0.1", port), timeout=LONGEST_S)
    try:
        return introduce(sock, key, WORKER, "data", identity, timeout_s)
    except BaseException:
        sock.close()
        raise


class Guarded:
    """OpenSSL's state of a connection, which notes whether two threads have been in it at once."""

    def __init__(self, end: TlsEnd) -> None:
        self._state, self._inside = end._state, 0
        self.overlapped = False
        end._state = self  # type: ignore[assignment]

    def _enter(self, call: Callable[..., Any], *given: Any) -> Any:
        self._inside += 1
        self.overlapped = self.overlapped or self._inside > 1
        try:
            return call(*given)
        finally:
            self._inside -= 1

    def read(self, nbytes: int, view: memoryview) -> Any:
        return self._enter(self._state.read, nbytes, view)

    def write(self, data: memoryview) -> Any:
        return self._enter(self._state.write, data)

    def pending(self) -> int:
        return self._state.pending()


class Pair:
    """Two links, at the ends of what a caller and a listener have made."""

    def __init__(self, door: Door, port: int, identity: Identity | None) -> None:
        self.here, self.there = Recorder(), Recorder()
        near = call(port, identity)
        door.wait_for(1)
        self.near = Link(near, 1, 2, self.here, name="near")
        self.far = Link(door.connections[0], 2, 1, self.there, name="far")
        self.near.start()
        self.far.start()

    def close(self) -> None:
        self.near.close()
        self.far.close()


@pytest.fixture
def pair(door: Door, wire: Wire, other_identity: Identity) -> Iterator[Pair]:
    ends = Pair(door, wire.port, other_identity)
    yield ends
    ends.close()


# -- what goes over it -----------------------------------------------------------------------------------------------


def test_frames_of_many_threads_both_ways_at_once(pair: Pair) -> None:
    """Small and large ones, while the other end sends as much."""
    guards = [Guarded(link._socket._end) for link in (pair.near, pair.far)]  # type: ignore[attr-defined]
    payloads = {(kind, size): os.urandom(size) for kind in KINDS for size in SIZES}

    def send(link: Link, kind: Opcode) -> None:
        for step, size in enumerate(SIZES * 3):
            whole = memoryview(payloads[kind, size])
            link.send(kind, [whole[: size // 3], whole[size // 3 :]], step=step)

    threads = [threading.Thread(target=send, args=(link, kind)) for link in (pair.near, pair.far) for kind in KINDS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    count = len(KINDS) * len(SIZES) * 3
    for recorder in (pair.here, pair.there):
        until(lambda frames=recorder.frames: len(frames) == count, "all frames")  # type: ignore[misc]
        for kind in KINDS:
            came = [(header.step, data) for header, data in recorder.frames if header.opcode is kind]
            assert [step for step, _ in came] == list(range(len(SIZES) * 3))
            assert [data for _, data in came] == [payloads[kind, size] for size in SIZES * 3]
        assert not recorder.errors
    assert not any(guard.overlapped for guard in guards)


def test_a_writer_that_is_stuck_keeps_nobody_from_reading(door: Door, other_identity: Identity) -> None:
    """The other end reads nothing, and sends."""
    recorder = Recorder()
    link = Link(call(door.listener.port, other_identity), 1, 2, recorder, name="near")
    link.start()
    door.wait_for(1)
    ended: list[NetworkError] = []

    def send() -> None:
        with pytest.raises(LinkLostError) as caught:
            link.send(Opcode.RESULTS, [bytes(256 << 20)])
        ended.append(caught.value)

    thread = threading.Thread(target=send)
    thread.start()
    far = door.connections[0]
    far.settimeout(LONGEST_S)
    until(lambda: is_full(far), "a writer that has filled all buffers")
    for number in range(50):
        header = Header(Opcode.ANSWER, source=2, destination=1, step=number, sequence=number, nbytes=len(TEXT))
        far.sendmsg([write_header(header), TEXT])
    until(lambda: len(recorder.frames) == 50, "what the other end says")
    assert {data for _, data in recorder.frames} == {TEXT} and thread.is_alive()
    far.shutdown(socket.SHUT_RDWR)
    thread.join()
    assert ended
    link.close()


def is_full(connection: Connection) -> bool:
    """Whether nothing more comes in, since what is there is not read."""
    assert isinstance(connection, TlsConnection)
    peeked = memoryview(bytearray(64 << 20))
    sizes = {connection._socket.recv_into(peeked, 0, socket.MSG_PEEK) for _ in range(3)}
    return len(sizes) == 1 and min(sizes) > RECORD_BYTES


@pytest.mark.parametrize("encrypted", [True, False])
def test_nothing_on_the_wire_can_be_read(encrypted: bool, identity: Identity, other_identity: Identity) -> None:
    """And everything can without encryption."""
    opened = Door(identity=identity if encrypted else None)
    between = Wire(opened.listener.port)
    ends = Pair(opened, between.port, other_identity if encrypted else None)
    try:
        ends.near.send(Opcode.HIDDEN, [TEXT], dtype="uint8", shape=(len(TEXT),))
        until(lambda: ends.there.frames, "the frame")
        ends.far.send(Opcode.FAILED, [TEXT])
        until(lambda: ends.here.frames, "the answer")
    finally:
        ends.close()
        between.close()
        opened.close()
    for secret in (MAGIC, TEXT, WORKER.encode(), MASTER.encode(), b"nonce", b"mac"):
        assert (secret in between.passed) is not encrypted, secret


def test_an_end_that_closes_says_why(pair: Pair) -> None:
    pair.far.close("it drains")
    until(lambda: pair.here.errors, "the end")
    assert pair.here.errors[0].message == "near: it drains"


def test_an_end_that_closes_the_encryption_alone_is_noticed(door: Door, identity: Identity) -> None:
    recorder = Recorder()
    with door.connect() as raw, identity.as_caller.wrap_socket(raw) as sock:
        greet_over(sock, identity)
        door.wait_for(1)
        link = Link(door.connections[0], 2, 1, recorder, name="far")
        link.start()
        sock.setblocking(False)
        with pytest.raises((ssl.SSLWantReadError, ssl.SSLEOFError)):
            sock.unwrap()  # says so, and would wait for the other end to say the same, unless that has ended by now
        until(lambda: recorder.errors, "the end")
    assert "has closed the connection" in recorder.errors[0].message
    link.close()


def test_a_record_that_is_damaged_on_the_way_ends_the_link(pair: Pair, wire: Wire) -> None:
    pair.near.send(Opcode.HIDDEN, [TEXT])
    until(lambda: pair.there.frames, "the frame before")
    wire.change = lambda data: data[:-1] + bytes([data[-1] ^ 1])
    pair.near.send(Opcode.HIDDEN, [TEXT])
    until(lambda: pair.there.errors, "the objection")
    assert isinstance(pair.there.errors[0], ProtocolError) and "bad record mac" in pair.there.errors[0].message
    assert len(pair.there.frames) == 1
    until(lambda: pair.here.errors, "the end")


def test_a_record_that_is_left_out_ends_the_link(pair: Pair, wire: Wire) -> None:
    """Records have numbers that are not sent: none can be left out, or put in twice."""
    before = len(wire.passed)
    wire.change = lambda data: b""
    pair.near.send(Opcode.HIDDEN, [TEXT])
    until(lambda: len(wire.passed) >= before + HEADER_BYTES + len(TEXT), "what is left out")
    wire.change = None
    pair.near.send(Opcode.HIDDEN, [TEXT])
    until(lambda: pair.there.errors, "the objection")
    assert "bad record mac" in pair.there.errors[0].message and not pair.there.frames


@pytest.mark.skipif(
    shutil.which("openssl") is None or sys.platform != "linux", reason="the command openssl is what changes keys"
)
def test_the_other_end_may_change_its_keys_and_ask_for_new_ones(identity: Identity) -> None:
    """As implementations do that count what a key has encrypted. What is sent next is read with the new keys."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = ["openssl", "s_client", "-connect", f"127.0.0.1:{server.getsockname()[1]}"]
        other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        sock, _ = server.accept()
    sock.settimeout(LONGEST_S)
    end = TlsEnd(identity, listens=True)
    while not end.is_open:
        end.take(sock.recv(RECORD_BYTES))
        end.go_on()
        sock.sendall(end.to_say())
    connection = TlsConnection(sock, end)
    try:
        for number in range(4):
            connection.sendall(b"answer %d\n" % number)
            type_in(other, b"K\n")
            type_in(other, b"line %d\n" % number)
            came = memoryview(bytearray(7))
            assert connection.recv_into(came, 0, socket.MSG_WAITALL) == 7 and came == b"line %d\n" % number
        type_in(other, b"Q\n")
        said = other.communicate()[0]
        assert said.count(b"KEYUPDATE") == 4 and all(b"answer %d" % number in said for number in range(4))
    finally:
        connection.close()
        other.kill()
        other.communicate()


def type_in(program: subprocess.Popen[bytes], line: bytes) -> None:
    """And wait until it has been read: the program looks for commands at the start of what it reads at once."""
    import fcntl
    import termios

    assert program.stdin is not None
    program.stdin.write(line)
    program.stdin.flush()
    left = bytearray(4)
    until(lambda: fcntl.ioctl(program.stdin, termios.FIONREAD, left) == 0 and not any(left), "the line read")  # type: ignore[arg-type]


def test_a_timeout_is_for_all_of_a_read(door: Door, wire: Wire, other_identity: Identity) -> None:
    connection = call(wire.port, other_identity)
    connection.settimeout(0.05)
    with pytest.raises(TimeoutError):
        connection.recv_into(memoryview(bytearray(10)))
    connection.close()


# -- who gets a connection -------------------------------------------------------------------------------------------


def greet_over(sock: ssl.SSLSocket, identity: Identity, key: bytes = KEY) -> None:
    """A caller's messages over somebody's own TLS, bound to the listener's certificate."""
    hello = greeting.encode_message(greeting.Hello("data", WORKER, greeting.new_nonce(), tls=True))
    sock.sendall(frame(Opcode.HELLO, hello))
    told = read(sock, Opcode.CHALLENGE)
    sock.sendall(frame(Opcode.PROOF, greeting.encode_message(prove(key, "caller", hello, told, identity.fingerprint))))
    welcome = greeting.decode_message(read(sock, Opcode.WELCOME), greeting.Proof)
    check_proof(welcome, key, "listener", hello, told, identity.fingerprint)


def read(sock: socket.socket, wanted: Opcode) -> bytes:
    header = read_header(exactly(sock, HEADER_BYTES))
    assert header.opcode is wanted
    return exactly(sock, header.nbytes)


def exactly(sock: socket.socket, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        part = sock.recv(nbytes - len(data))
        assert part, data
        data += part
    return data


def test_both_know_the_token(door: Door, identity: Identity, other_identity: Identity) -> None:
    with_tls = call(door.listener.port, other_identity)
    door.wait_for(1)
    ((hello, _),) = door.welcomed
    assert hello.tls and isinstance(with_tls, TlsConnection) and isinstance(door.connections[0], TlsConnection)
    assert with_tls.binding == door.connections[0].binding == identity.fingerprint
    with_tls.close()


def test_another_token_is_refused(door: Door, other_identity: Identity) -> None:
    with pytest.raises(ClusterRefusedError, match="another cluster token"):
        call(door.listener.port, other_identity, OTHER_KEY)
    assert "another cluster token" in door.refusal() and not door.welcomed


class Between:
    """Somebody who takes connections with a certificate of his own, and passes on what is said inside of them."""

    def __init__(self, port: int, takes: Identity | None, calls: Identity | None) -> None:
        self._target, self._takes, self._calls = port, takes, calls
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self._thread = threading.Thread(target=self._relay)
        self._thread.start()

    def _relay(self) -> None:
        near, _ = self._server.accept()
        far = socket.create_connection(("127.0.0.1", self._target))
        for sock in (near, far):
            sock.settimeout(LONGEST_S)
        if self._takes is not None:
            near = self._takes.as_listener.wrap_socket(near, server_side=True)
        if self._calls is not None:
            far = self._calls.as_caller.wrap_socket(far)
        with near, far:
            turns = [(near, far), (far, near)] * 2  # HELLO, CHALLENGE, PROOF, WELCOME or the reason
            for source, target in turns:
                head = source.recv(HEADER_BYTES, *(() if isinstance(source, ssl.SSLSocket) else (socket.MSG_WAITALL,)))
                if not head:
                    return
                header = read_header(head)
                target.sendall(head + (exactly(source, header.nbytes) if header.nbytes else b""))
                if header.opcode is Opcode.REFUSED:
                    return

    def close(self) -> None:
        self._thread.join()
        self._server.close()


@pytest.fixture
def between() -> Iterator[Callable[..., Between]]:
    opened: list[Between] = []

    def start(*given: Any) -> Between:
        opened.append(Between(*given))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def test_somebody_in_between_is_refused_by_the_listener(
    door: Door, between: Callable[..., Between], other_identity: Identity
) -> None:
    """Who passes on what both say, and knows no token."""
    middle = between(door.listener.port, new_identity(), other_identity)
    with pytest.raises(ClusterRefusedError, match="somebody is between the two"):
        call(middle.port, other_identity)
    assert "somebody is between the two" in door.refusal() and not door.welcomed


def test_somebody_in_between_is_refused_by_the_caller(
    door: Door, between: Callable[..., Between], other_identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the listener has taken him in, and has said so with a proof of its own."""

    def lenient(proof: Any, key: bytes, side: str, *told: bytes) -> None:
        if side == "listener":
            check_proof(proof, key, side, *told)  # type: ignore[arg-type]

    monkeypatch.setattr(greeting, "check_proof", lenient)
    middle = between(door.listener.port, new_identity(), other_identity)
    with pytest.raises(ClusterRefusedError, match="somebody is between the two"):
        call(middle.port, other_identity)
    door.wait_for(1)


def test_nobody_in_between_can_take_the_encryption_away(
    door: Door, plain_door: Door, between: Callable[..., Between], other_identity: Identity
) -> None:
    """Of one half of the way: a caller that encrypts ends nowhere else, and a listener takes nobody else in."""
    half = between(plain_door.listener.port, new_identity(), None)
    with pytest.raises(ClusterRefusedError, match="the caller encrypts") as caught:
        call(half.port, other_identity)
    assert caught.value.message == plain_door.refusal() == CALLER_ENCRYPTS and not plain_door.welcomed
    half = between(door.listener.port, None, other_identity)
    with pytest.raises(ClusterRefusedError, match="the listener encrypts") as caught:
        call(half.port, None)
    assert caught.value.message == door.refusal() == LISTENER_ENCRYPTS and not door.welcomed


def test_a_caller_that_does_not_encrypt_is_told_in_one_line(door: Door) -> None:
    with pytest.raises(ClusterRefusedError) as caught:
        call(door.listener.port, None)
    assert caught.value.message == door.refusal() == LISTENER_ENCRYPTS and "\n" not in LISTENER_ENCRYPTS
    assert "--cluster-tls" in LISTENER_ENCRYPTS and not door.welcomed


def test_a_listener_that_does_not_encrypt_is_left_with_one_line(plain_door: Door, other_identity: Identity) -> None:
    with pytest.raises(ClusterRefusedError) as caught:
        call(plain_door.listener.port, other_identity)
    assert caught.value.message == plain_door.refusal() == CALLER_ENCRYPTS and "\n" not in CALLER_ENCRYPTS
    assert "--cluster-tls" in CALLER_ENCRYPTS and not plain_door.welcomed


def old_hello() -> bytes:
    """The first message of a caller that has no TLS 1.3."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    return first_message(context)


def first_message(context: ssl.SSLContext) -> bytes:
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    return outgoing.read()


@pytest.mark.parametrize(
    "said",
    [
        lambda identity: b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        lambda identity: bytes(64),
        lambda identity: b"\x16\x03\x01\xff\xff" + bytes(100_000),
        lambda identity: b"\x16\x03\x01\x00\x40" + os.urandom(64),
        lambda identity: first_message(identity.as_caller) + b"\x17\x03\x03\x00\x40" + os.urandom(64),
        lambda identity: first_message(identity.as_caller) * 2,
        lambda identity: old_hello(),
        lambda identity: MAGIC + bytes(60),
    ],
)
def test_whoever_says_something_else_is_left(
    door: Door, said: Callable[[Identity], bytes], other_identity: Identity
) -> None:
    with door.connect() as sock:
        try:
            sock.sendall(said(other_identity))
        except ConnectionError:
            return
        assert left(sock)
    assert not door.welcomed
    call(door.listener.port, other_identity).close()
    door.wait_for(1)


def test_half_a_handshake_keeps_nobody_out(door: Door, other_identity: Identity) -> None:
    opening = first_message(other_identity.as_caller)
    halves = [door.connect() for _ in range(MAX_GREETING + 20)]
    try:
        for number, sock in enumerate(halves):
            sock.sendall(opening[: (3, len(opening) // 2, len(opening))[number % 3]])
        call(door.listener.port, other_identity).close()
        door.wait_for(1)
        assert left(halves[0]), "the oldest made room"
    finally:
        for sock in halves:
            sock.close()


@pytest.mark.parametrize("said", [b"", b"\x16", b"\x16\x03\x03\x00\x7a" + bytes(20)])
def test_a_listener_that_says_half_of_it_is_not_waited_for_long(said: bytes, other_identity: Identity) -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(said)
    with ours, theirs, pytest.raises(LinkLostError, match=r"no answer within 0\.2 s"):
        introduce(ours, KEY, WORKER, "data", other_identity, timeout_s=0.2)


@pytest.mark.parametrize("said", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x16\x03\x03\x00\x04\xff\0\0\0"])
def test_a_listener_that_says_something_else_is_left(said: bytes, other_identity: Identity) -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(said)
    with ours, theirs, pytest.raises(ProtocolError, match="TLS"):
        introduce(ours, KEY, WORKER, "data", other_identity, timeout_s=LONGEST_S)


def test_a_greeting_that_forgot_the_encryption_is_not_possible(plain_door: Door) -> None:
    """`greet` says what kind of connection it was given."""
    with plain_door.connect() as sock:
        greet(sock, KEY, WORKER, "control")
        plain_door.wait_for(1)
    assert plain_door.welcomed[0][0].tls is False


# -- certificates ----------------------------------------------------------------------------------------------------


def test_a_certificate_is_new_each_time_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    written: list[bytes] = []
    write = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: written.append(data) or write(path, data))  # type: ignore[func-returns-value]
    first, second = new_identity(), new_identity()
    assert first.fingerprint != second.fingerprint
    assert not list(tmp_path.iterdir()) and len(written) == 2
    assert all(b"BEGIN ENCRYPTED PRIVATE KEY" in data and b"BEGIN PRIVATE KEY" not in data for data in written)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(ConfigError, match=r"cluster\.tls .* cryptography .* pip install 'vramancer\[tls\]'"):
        new_identity()
