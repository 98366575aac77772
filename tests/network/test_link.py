"""Frames over a connection: what arrives, in which order, how much may wait, and how it ends."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from steering import LONGEST_WAIT_S, until

from core.errors import LinkLostError, NetworkError, ProtocolError
from core.network import sending
from core.network.flow import WINDOW_BYTES, cost
from core.network.frames import MIB, SUMMED_AHEAD_BYTES, Flag, Header, Opcode, Sum, write_header
from core.network.link import Link
from core.network.sockets import send_all
from core.network.traffic import LinkStats


class Recorder:
    """Keeps what arrives. `hold`: payloads are not released."""

    def __init__(self, hold: bool = False) -> None:
        self.frames: list[tuple[Header, bytes]] = []
        self.errors: list[NetworkError] = []
        self.hold = hold
        self.buffer: memoryview | None = None

    def buffer_for(self, header: Header) -> memoryview | None:
        return self.buffer

    def received(self, header: Header, payload: memoryview) -> bool:
        self.frames.append((header, bytes(payload)))
        return not self.hold

    def lost(self, error: NetworkError) -> None:
        self.errors.append(error)


class Pair:
    """Two ends."""

    def __init__(self, sockets: tuple[socket.socket, socket.socket] | None = None) -> None:
        sockets = sockets or socket.socketpair()
        self.here, self.there = Recorder(), Recorder()
        self.near = Link(sockets[0], 1, 2, self.here, name="near")
        self.far = Link(sockets[1], 2, 1, self.there, name="far")
        self.sockets = sockets
        self.near.start()
        self.far.start()

    def close(self) -> None:
        self.near.close()
        self.far.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    ends = Pair()
    yield ends
    ends.close()


def test_frames_arrive_in_order_with_all_that_was_said_of_them(pair: Pair) -> None:
    payload = [b"first ", memoryview(bytearray(b"second"))]
    pair.near.send(Opcode.HIDDEN, payload, step=7, layer=3, dtype="bfloat16", shape=(1, 2, 3), flags=Flag.LAST)
    pair.near.send(Opcode.SKIP, step=8)
    until(lambda: len(pair.there.frames) == 2, "both frames")
    (first, data), (second, nothing) = pair.there.frames
    assert data == b"first second" and nothing == b""
    assert (first.step, first.layer, first.dtype, first.shape) == (7, 3, "bfloat16", (1, 2, 3))
    assert first.flags == Flag.LAST | Flag.CHECKED
    assert (first.source, first.destination, first.sequence, second.sequence) == (1, 2, 0, 1)
    assert (pair.near.stats.sent_frames, pair.near.stats.sent_bytes) == (2, 12)
    assert (pair.far.stats.received_frames, pair.far.stats.received_bytes) == (2, 12)


def test_a_payload_goes_into_the_buffer_that_was_named(pair: Pair) -> None:
    buffer = bytearray(100)
    pair.there.buffer = memoryview(buffer)
    pair.near.send(Opcode.KV_PAGES, [b"pages"])
    until(lambda: pair.there.frames, "the frame")
    assert bytes(buffer[:6]) == b"pages\0"


@pytest.mark.parametrize("nbytes", [SUMMED_AHEAD_BYTES, SUMMED_AHEAD_BYTES + 1, 5 * MIB, 5 * MIB + 77])
def test_large_payloads_are_summed_while_they_travel(nbytes: int) -> None:
    """Between ends with different addresses: others look for memory that both see."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        caller = socket.create_connection(server.getsockname(), source_address=("127.0.0.2", 0))
        pair = Pair((caller, server.accept()[0]))
    data = os.urandom(nbytes)
    pair.near.send(Opcode.WEIGHTS, [data[:1000], b"", memoryview(data)[1000:]], flags=Flag.LAST)
    pair.near.send(Opcode.SKIP)
    until(lambda: len(pair.there.frames) == 2, "both frames")
    header, came = pair.there.frames[0]
    assert came == data
    assert header.flags == Flag.LAST | (Flag.TRAILED if nbytes > SUMMED_AHEAD_BYTES else Flag.CHECKED)
    pair.close()


def test_a_payload_as_large_as_the_window_does_not_wait_for_credit_that_nobody_tells_of(pair: Pair) -> None:
    """What is released is told of once enough of it has come together."""
    for _ in range(3):
        pair.near.send(Opcode.KV_PAGES, [bytes(1000)])
    until(lambda: len(pair.there.frames) == 3, "the small ones")
    pair.near.send(Opcode.HIDDEN, [bytes(WINDOW_BYTES + 1)])
    until(lambda: len(pair.there.frames) == 4, "the large one")


@pytest.mark.parametrize("at", [0, MIB, 2 * MIB - 1, 2 * MIB, 2 * MIB + 3])
def test_damage_on_the_way_is_found(at: int) -> None:
    """In a large payload, and in what follows it."""
    nbytes = 2 * MIB
    payload, total = bytes(nbytes), Sum()
    total.add(payload)
    said = bytearray(
        write_header(Header(Opcode.WEIGHTS, Flag.TRAILED, source=1, destination=2, nbytes=nbytes)) + payload
        + total.trailer()
    )  # fmt: skip
    said[64 + at] ^= 1
    ours, theirs = socket.socketpair()
    recorder = Recorder()
    link = Link(theirs, 2, 1, recorder, name="far")
    link.start()
    ours.sendall(said)
    until(lambda: recorder.errors, "the objection")
    assert "WEIGHTS: the payload's checksum is wrong" in recorder.errors[0].message and not recorder.frames
    link.close()
    ours.close()


def test_large_payloads_both_ways_at_once(pair: Pair) -> None:
    data = os.urandom(5 << 20)
    threads = [
        threading.Thread(target=lambda link=link: [link.send(Opcode.WEIGHTS, [data]) for _ in range(4)])  # type: ignore[misc]
        for link in (pair.near, pair.far)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: len(pair.here.frames) == len(pair.there.frames) == 4, "all frames")
    assert all(found == data for _, found in pair.here.frames + pair.there.frames)


def test_a_sender_waits_for_what_the_other_end_has_not_released(pair: Pair) -> None:
    pair.there.hold = True
    piece = bytes(WINDOW_BYTES // 4)
    for _ in range(4):
        pair.near.send(Opcode.KV_PAGES, [piece])
    sent: list[bool] = []
    thread = threading.Thread(target=lambda: (pair.near.send(Opcode.KV_PAGES, [piece]), sent.append(True)))
    thread.start()
    until(lambda: len(pair.there.frames) == 4, "what fits")
    pair.near.send(Opcode.ANSWER)  # needs no credit
    until(lambda: len(pair.there.frames) == 5, "the answer")
    assert not sent
    pair.far.release(pair.there.frames[0][0])
    thread.join()
    until(lambda: len(pair.there.frames) == 6, "the one that waited")


def test_many_small_frames_never_run_out_of_credit(pair: Pair) -> None:
    """More than the window holds at a time."""
    for number in range(2 * WINDOW_BYTES // cost(0) + 10):
        pair.near.send(Opcode.SKIP, step=number)
    until(lambda: len(pair.there.frames) == 2 * WINDOW_BYTES // cost(0) + 10, "all frames")
    assert [header.step for header, _ in pair.there.frames[:3]] == [0, 1, 2]


def test_frames_of_another_epoch_are_dropped_and_counted(pair: Pair) -> None:
    pair.near.send(Opcode.HIDDEN, [b"old"])
    until(lambda: pair.there.frames, "the first frame")
    pair.far.epoch = 1
    for _ in range(200):
        pair.near.send(Opcode.HIDDEN, [bytes(WINDOW_BYTES // 64)])  # released, or the sender would wait for ever
    pair.near.epoch = 1
    pair.near.send(Opcode.HIDDEN, [b"new"])
    until(lambda: pair.there.frames[-1][1] == b"new", "the frame of this epoch")
    assert [data for _, data in pair.there.frames] == [b"old", b"new"]
    assert pair.far.stats.stale == 200


def test_an_end_that_closes_is_noticed_with_its_reason(pair: Pair) -> None:
    pair.far.close("it drains")
    until(lambda: pair.here.errors, "the end")
    (error,) = pair.here.errors
    assert isinstance(error, LinkLostError) and error.message == "near: it drains"
    with pytest.raises(LinkLostError, match="it drains"):
        pair.near.send(Opcode.SKIP)
    assert len(pair.there.errors) == 1


def test_a_connection_that_breaks_ends_a_sender_that_waits(pair: Pair) -> None:
    pair.there.hold = True
    for _ in range(4):
        pair.near.send(Opcode.KV_PAGES, [bytes(WINDOW_BYTES // 4)])
    caught: list[BaseException] = []

    def send() -> None:
        try:
            pair.near.send(Opcode.KV_PAGES, [b"more"])
        except LinkLostError as error:
            caught.append(error)

    thread = threading.Thread(target=send)
    thread.start()
    pair.sockets[1].shutdown(socket.SHUT_RDWR)
    thread.join()
    assert caught and len(pair.here.errors) == 1


def raw(write: Callable[[socket.socket], Any]) -> Recorder:
    """What a link makes of bytes that are written to it by hand."""
    here, there = socket.socketpair()
    recorder = Recorder()
    link = Link(here, 1, 2, recorder, name="raw")
    link.start()
    with there:
        write(there)
        until(lambda: recorder.errors, "the end of the link")
        link.close()
    return recorder


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"x" * 64, "this is not VTP"),
        (write_header(Header(Opcode.SKIP, sequence=1)), "frame 1 instead of 0"),
        (write_header(Header(Opcode.CALL, Flag.CHECKED, nbytes=1, checksum=5)) + b"a", "checksum is wrong"),
        (write_header(Header(Opcode.CREDIT, step=1)), "more credit than there is"),
    ],
)
def test_what_is_not_allowed_ends_the_link(data: bytes, said: str) -> None:
    (error,) = raw(lambda sock: sock.sendall(data)).errors
    assert isinstance(error, ProtocolError) and said in error.message


def test_half_a_frame_and_the_end(pair: Pair) -> None:
    def write(sock: socket.socket) -> None:
        sock.sendall(write_header(Header(Opcode.CALL, nbytes=100)) + b"half")
        sock.shutdown(socket.SHUT_WR)

    (error,) = raw(write).errors
    assert isinstance(error, LinkLostError) and "has closed the connection" in error.message


def test_systems_without_sendmsg(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []

    class Plain:
        def sendall(self, data: bytes) -> None:
            sent.append(bytes(data))

    send_all(Plain(), [b"head", memoryview(b"body")])  # type: ignore[arg-type]
    assert sent == [b"head", b"body"]


def test_what_no_frame_may_hold_is_not_sent(pair: Pair) -> None:
    with pytest.raises(ProtocolError, match="CREDIT of 1 bytes; up to 0 are allowed"):
        pair.near.send(Opcode.CREDIT, [b"a"])
    pair.near.send(Opcode.SKIP)
    until(lambda: pair.there.frames, "the next frame")


def test_an_end_that_two_threads_close_says_goodbye_once(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other thread waits for it, and does not close the connection under it."""
    begun, go_on = threading.Event(), threading.Event()
    pack = sending.pack_header

    def slow(opcode: Opcode, *fields: Any) -> bytes:
        if opcode is Opcode.BYE:
            begun.set()
            assert go_on.wait(LONGEST_WAIT_S)
        return pack(opcode, *fields)

    monkeypatch.setattr(sending, "pack_header", slow)
    failed: list[BaseException] = []

    def close(reason: str) -> None:
        try:
            pair.near.close(reason)
        except BaseException as error:  # noqa: BLE001  looked at below
            failed.append(error)

    first = threading.Thread(target=close, args=("this is the reason",))
    first.start()
    assert begun.wait(LONGEST_WAIT_S)
    second = threading.Thread(target=close, args=("another",))
    second.start()
    until(lambda: pair.near._error is not None, "it has ended")
    go_on.set()
    first.join()
    second.join()
    assert not failed
    until(lambda: bool(pair.there.errors), "it is heard")
    assert "this is the reason" in pair.there.errors[0].message


def test_signs_of_life_measure_the_way_there_and_back() -> None:
    heard: list[tuple[str, float]] = []
    sockets = socket.socketpair()
    near = Link(
        sockets[0], 1, 2, Recorder(), name="near", heartbeat_s=0.02,
        observe=lambda operation, seconds: heard.append((operation, seconds)),
    )  # fmt: skip
    far = Link(sockets[1], 2, 1, Recorder(), name="far")  # which has nothing to say by itself
    near.start()
    far.start()
    try:
        until(lambda: len(heard) > 2, "answers")
        assert {operation for operation, _ in heard} == {"round_trip"}
        assert all(0 < seconds < LONGEST_WAIT_S for _, seconds in heard)
        assert near.round_trip_s is not None and far.round_trip_s is None
        until(lambda: near.stats.sent_signs > 2, "they are counted")  # each once it has been sent
        assert near.stats.received_signs > 2
        near.send(Opcode.SKIP)
        near.send(Opcode.HIDDEN, [bytes(8)], dtype="bfloat16", shape=(4,))
        assert len([operation for operation, _ in heard if operation == "send"]) == 1, "of the tensor alone"
        until(lambda: far.stats.received_frames == 2, "both frames")
    finally:
        near.close()
        far.close()
    total = LinkStats()
    for link in (near, far):
        total.add(link.stats)
    assert (total.sent_tensors, total.sent_tensor_bytes, total.received_tensors) == (1, 8, 1)


def test_an_answer_to_what_was_never_asked_says_nothing(pair: Pair) -> None:
    pair.near.send(Opcode.HEARTBEAT, step=1, layer=1)
    pair.near.send(Opcode.SKIP)
    until(lambda: pair.there.frames, "the frame behind it")
    assert pair.far.round_trip_s is None
