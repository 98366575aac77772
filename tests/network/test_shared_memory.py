"""Large payloads through memory that two processes see: what arrives, what is declined, and what is left behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from network.ends import Ends
from network.recorder import Recorder
from steering import until

from core.errors import ProtocolError
from core.network import shared_memory
from core.network.frames import MIB, Flag, Header, Opcode, checksum, write_header
from core.network.link import Link
from core.network.shared_memory import LEAST_BYTES, RING_BYTES, SharedMemory

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not shared_memory._ORDERED, reason="memory is shared on x86 Linux alone"
)

OTHER_PROCESS = """
import socket, sys
from core.network.frames import Opcode
from core.network.link import Link
import threading

class Answers:
    ended = threading.Event()
    def buffer_for(self, header): return None
    def received(self, header, payload):
        link.send(Opcode.ANSWER, [bytes(payload[:8]), bytes(payload[-8:])], step=sum(memoryview(payload)[::4097]))
        return True
    def lost(self, error): self.ended.set()

link = Link(socket.socket(fileno=int(sys.argv[1])), 2, 1, Answers(), name="other")
link.start()
Answers.ended.wait()
link.close()
"""


class SharingEnds(Ends):
    def agree(self) -> None:
        """The first large payload brings the offer; until it is answered, payloads go through the kernel."""
        until(lambda: self.send(os.urandom(LEAST_BYTES + 1))[0] == Flag.SHARED, "shared memory")


@pytest.fixture
def ends() -> Iterator[SharingEnds]:
    pair = SharingEnds(socket.socketpair())
    yield pair
    pair.close()


@pytest.mark.parametrize("nbytes", [LEAST_BYTES + 1, MIB - 1, MIB, 3 * MIB + 77, 40 * MIB, RING_BYTES])
def test_large_payloads_arrive_as_they_were(ends: SharingEnds, nbytes: int) -> None:
    ends.agree()
    for _ in range(3):
        data = os.urandom(nbytes)
        assert ends.send(data) == (Flag.SHARED, data)


def test_parts_that_follow_each_other_are_one_payload(ends: SharingEnds) -> None:
    ends.agree()
    parts = [os.urandom(700_001), os.urandom(3), os.urandom(2 * MIB)]
    ends.near.send(Opcode.KV_PAGES, parts, step=3, layer=4, dtype="uint8", shape=(sum(map(len, parts)),))
    until(lambda: ends.there.frames[-1][0].step == 3, "the payload")
    header, came = ends.there.frames[-1]
    assert came == b"".join(parts) and header.layer == 4 and header.flags == Flag.SHARED


def test_what_is_small_goes_over_the_connection(ends: SharingEnds) -> None:
    ends.agree()
    assert ends.send(b"small") == (Flag.CHECKED, b"small")


def test_payloads_that_wait_share_the_ring(ends: SharingEnds) -> None:
    """Several are under way at once, so the ring is gone round, and none writes over another one."""
    ends.agree()
    count, sent = len(ends.there.frames), [os.urandom(9 * MIB + index) for index in range(20)]
    for data in sent:
        ends.near.send(Opcode.KV_PAGES, [data])
    until(lambda: len(ends.there.frames) == count + len(sent), "all of them")
    assert [came for _, came in ends.there.frames[count:]] == sent
    assert {header.flags for header, _ in ends.there.frames[count:]} <= {Flag.SHARED, Flag.TRAILED}
    assert Flag.SHARED in {header.flags for header, _ in ends.there.frames[count:]}


def test_a_payload_larger_than_the_ring_goes_over_the_connection(ends: SharingEnds) -> None:
    ends.agree()
    data = bytes(RING_BYTES + 1)
    assert ends.send(data) == (Flag.TRAILED, data)


def test_both_directions_have_their_own(ends: SharingEnds) -> None:
    ends.agree()
    backwards = SharingEnds.__new__(SharingEnds)
    backwards.near, backwards.far, backwards.here, backwards.there = ends.far, ends.near, ends.there, ends.here
    backwards.agree()
    data = os.urandom(5 * MIB)
    assert backwards.send(data) == (Flag.SHARED, data)
    assert ends.send(data) == (Flag.SHARED, data)


def test_frames_of_another_epoch_are_dropped_and_their_room_is_free_again(ends: SharingEnds) -> None:
    ends.agree()
    ends.near.epoch = 1
    for _ in range(4):
        ends.near.send(Opcode.KV_PAGES, [bytes(RING_BYTES // 2)])
    ends.near.epoch = 0
    data = os.urandom(2 * MIB)
    ends.near.send(Opcode.KV_PAGES, [data], step=9)
    until(lambda: ends.there.frames[-1][0].step == 9, "the payload")
    assert ends.there.frames[-1][1] == data and ends.far.stats.stale == 4
    until(lambda: ends.send(data) == (Flag.SHARED, data), "room")


def test_ends_with_different_addresses_do_not_look_for_memory() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        caller = socket.create_connection(server.getsockname(), source_address=("127.0.0.2", 0))
        pair = SharingEnds((caller, server.accept()[0]))
    data = os.urandom(2 * MIB)
    assert [pair.send(data) for _ in range(3)] == [(Flag.TRAILED, data)] * 3
    pair.close()


def test_another_process_reads_what_was_written_here() -> None:
    ours, theirs = socket.socketpair()
    recorder = Recorder()
    with subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS, str(theirs.fileno())], pass_fds=[theirs.fileno()],
        cwd=Path(__file__).parents[2],
    ):  # fmt: skip
        theirs.close()
        link = Link(ours, 1, 2, recorder, name="here")
        link.start()
        for index in range(12):
            data = os.urandom(3 * MIB + index)
            link.send(Opcode.KV_PAGES, [data])
            until(partial(lambda count: len(recorder.frames) > count, index), "the answer")
            header, ends_of_it = recorder.frames[index]
            assert ends_of_it == data[:8] + data[-8:] and header.step == sum(data[::4097])
        assert link._memory.takes(MIB)  # and that was the way they went
        link.close()


def test_nothing_is_left_open_or_mapped() -> None:
    def held() -> int:
        mapped = Path("/proc/self/maps").read_text().splitlines()
        opened = [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
        return sum("vramancer-link" in each for each in [*mapped, *opened])

    before = held()
    pair = SharingEnds(socket.socketpair())
    pair.agree()
    assert held() > before
    pair.close()
    del pair
    until(lambda: held() == before, "the memory to be gone")


# -- offers that are none ---------------------------------------------------------------------------------------------


def a_file(size: int) -> Callable[[], tuple[int, Callable[[], None]]]:
    def make() -> tuple[int, Callable[[], None]]:
        fd, path = tempfile.mkstemp()
        Path(path).unlink()
        os.ftruncate(fd, size)
        return fd, lambda: os.close(fd)

    return make


def an_unsealed_memory() -> tuple[int, Callable[[], None]]:
    fd = os.memfd_create("vramancer-link", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, shared_memory._HEAD_BYTES + RING_BYTES)
    return fd, lambda: os.close(fd)


def a_pipe() -> tuple[int, Callable[[], None]]:
    read, write = os.pipe()

    def close() -> None:
        os.close(read)
        os.close(write)

    return read, close


@pytest.mark.parametrize(
    "made", [a_file(shared_memory._HEAD_BYTES + RING_BYTES), a_file(10), an_unsealed_memory, a_pipe]
)
def test_what_is_no_sealed_memory_is_declined(made: Callable[[], tuple[int, Callable[[], None]]]) -> None:
    fd, close = made()
    ours, theirs = socket.socketpair()
    offer = shared_memory._OFFER.pack(os.getpid(), fd, RING_BYTES, bytes(32))
    assert not SharedMemory(ours).open(offer)
    close()
    ours.close()
    theirs.close()


@pytest.mark.parametrize("change", ["pid", "fd", "nonce", "size"])
def test_an_offer_of_somebody_elses_memory_is_declined(change: str) -> None:
    ours, theirs = socket.socketpair()
    memory = SharedMemory(ours)
    offered = memory.offer(MIB)
    assert offered is not None
    pid, fd, size, nonce = shared_memory._OFFER.unpack(offered)
    changed = {
        "pid": (1 << 22, fd, size, nonce), "fd": (pid, 1 << 20, size, nonce), "nonce": (pid, fd, size, bytes(32)),
        "size": (pid, fd, size + 4096, nonce),
    }[change]  # fmt: skip
    assert not SharedMemory(theirs).open(shared_memory._OFFER.pack(*changed))
    assert SharedMemory(theirs).open(offered)  # as it was, it would do
    memory.close()
    ours.close()
    theirs.close()


def test_an_offer_from_another_host_is_not_looked_at() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        caller = socket.create_connection(server.getsockname(), source_address=("127.0.0.2", 0))
        listener = server.accept()[0]
    ours, theirs = socket.socketpair()
    memory = SharedMemory(ours)
    offered = memory.offer(MIB)
    assert offered is not None and not SharedMemory(listener).open(offered)
    memory.close()
    for sock in (caller, listener, ours, theirs):
        sock.close()


# -- ends that do not keep to it --------------------------------------------------------------------------------------


def frame(opcode: Opcode, sequence: int, data: bytes = b"", **fields: int) -> bytes:
    header = Header(opcode, Flag.CHECKED, source=1, destination=2, sequence=sequence, nbytes=len(data), step=0,
                    checksum=checksum((data,)))  # fmt: skip
    return write_header(header._replace(**fields)) + data


def offer_of(sock: socket.socket) -> tuple[SharedMemory, bytes]:
    memory = SharedMemory(sock)
    offered = memory.offer(MIB)
    assert offered is not None
    return memory, offered


SHARED_PAYLOAD = {"flags": int(Flag.SHARED), "nbytes": MIB, "checksum": 0}


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        (lambda offer: frame(Opcode.KV_PAGES, 0, **SHARED_PAYLOAD), "memory that was not offered"),
        (lambda offer: frame(Opcode.SHARE, 0, offer) + frame(Opcode.SHARE, 1, offer), "or a second one"),
        (lambda offer: frame(Opcode.SHARE, 0, offer[:-1]), "an offer of memory with 47 bytes"),
        (lambda offer: frame(Opcode.SHARED, 0, step=1), "accepted that was not offered"),
        (lambda offer: frame(Opcode.HEARTBEAT, 0, flags=int(Flag.SHARED)), "does not travel in shared memory"),
        (
            lambda offer: frame(Opcode.SHARE, 0, offer) + frame(Opcode.KV_PAGES, 1, **SHARED_PAYLOAD)
            + RING_BYTES.to_bytes(8, "little"),
            "not within a ring",
        ),
        (
            lambda offer: frame(Opcode.SHARE, 0, offer)
            + frame(Opcode.KV_PAGES, 1, **{**SHARED_PAYLOAD, "nbytes": RING_BYTES + 1}) + bytes(8),
            "not within a ring",
        ),
        (
            lambda offer: frame(Opcode.SHARE, 0, offer) + frame(Opcode.KV_PAGES, 1, **SHARED_PAYLOAD) + bytes(8)
            + b"\1",
            "said to be in shared memory, and is not",
        ),
    ],
)  # fmt: skip
def test_who_does_not_keep_to_it_is_left(said: Callable[[bytes], bytes], complaint: str) -> None:
    ours, theirs = socket.socketpair()
    memory, offered = offer_of(ours)
    recorder = Recorder()
    link = Link(theirs, 2, 1, recorder, name="far")
    link.start()
    ours.sendall(said(offered))
    until(lambda: bool(recorder.errors), "the objection")
    assert isinstance(recorder.errors[0], ProtocolError) and complaint in recorder.errors[0].message
    assert not recorder.frames
    link.close()
    memory.close()
    ours.close()


def test_an_end_that_claims_to_have_copied_more_than_there_was_gets_no_more(ends: SharingEnds) -> None:
    ends.agree()
    outgoing = ends.near._memory._outgoing
    assert outgoing is not None
    outgoing._region.copied[0] += 1
    data = os.urandom(2 * MIB)
    assert ends.send(data) == (Flag.TRAILED, data)
