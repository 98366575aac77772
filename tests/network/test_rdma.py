"""Large payloads into another host's memory: what arrives, what is declined, and what happens when it fails.

`Here` stands for a network card: it copies within this process. Where NIXL is installed, the same is done by it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from network.cards import Here
from network.ends import Ends
from network.recorder import Recorder
from steering import LONGEST_WAIT_S, until

from core.errors import ProtocolError
from core.network import rdma
from core.network.frames import MIB, Flag, Header, Opcode, checksum, write_header
from core.network.link import Link
from core.network.nixl_agent import Agent, NixlAgent, is_installed, rdma_devices
from core.network.rdma import LEAST_BYTES, REGION_BYTES, RemoteMemory, agent_for, no_agent

BY_RDMA, BY_TCP = Flag.REMOTE | Flag.CHECKED, Flag.TRAILED


class Fails(Here):
    """Once it is told to."""

    fails = False

    def write(self, source: int, nbytes: int, other: str, target: int) -> Callable[[], bool]:
        if self.fails:
            raise OSError("the card is gone")
        return super().write(source, nbytes, other, target)


class Damages(Here):
    def _moved(self, nbytes: int) -> int:
        return nbytes - 8


class Stalls(Here):
    def write(self, source: int, nbytes: int, other: str, target: int) -> Callable[[], bool]:
        return lambda: False


class DistantEnds(Ends):
    """Between different addresses."""

    def __init__(self, near: Callable[[], Agent] = Here, far: Callable[[], Agent] = Here) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            caller = socket.create_connection(server.getsockname(), source_address=("127.0.0.2", 0))
            listener = server.accept()[0]
        super().__init__((caller, listener), near, far)


@pytest.fixture(autouse=True)
def quicker(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Probes are sent; which way was quicker is what this says."""
    found, timed = [True], RemoteMemory._time

    def time(self: RemoteMemory, *, by_rdma: bool) -> float:
        timed(self, by_rdma=by_rdma)
        return 1.0 if by_rdma is found[0] else 2.0

    monkeypatch.setattr(RemoteMemory, "_time", time)
    return found


@pytest.fixture
def ends() -> Iterator[DistantEnds]:
    pair = DistantEnds()
    assert pair.near.ask_for_rdma(LONGEST_WAIT_S)
    yield pair
    pair.close()


def test_large_payloads_arrive_as_they_were(ends: DistantEnds) -> None:
    """The region is gone round more than once."""
    for nbytes in (LEAST_BYTES + 1, MIB - 1, 3 * MIB + 77, REGION_BYTES, 40 * MIB, 40 * MIB + 1):
        data = (os.urandom(999_983) * 70)[:nbytes]
        until(partial(ends.near._remote.takes, nbytes), "room")
        assert ends.send(data) == (BY_RDMA, data)
    assert ends.far.stats.received_rdma_bytes == ends.near.stats.sent_rdma_bytes > 2 * REGION_BYTES, "without probes"


def test_parts_that_follow_each_other_are_one_payload(ends: DistantEnds) -> None:
    parts = [os.urandom(700_001), os.urandom(3), os.urandom(2 * MIB)]
    ends.near.send(Opcode.KV_PAGES, parts, step=3, layer=4, dtype="uint8", shape=(sum(map(len, parts)),))
    until(lambda: bool(ends.there.frames), "the payload")
    header, came = ends.there.frames[-1]
    assert came == b"".join(parts) and (header.step, header.layer, header.flags) == (3, 4, BY_RDMA)


def test_what_is_small_or_has_no_room_goes_over_the_connection(ends: DistantEnds) -> None:
    assert ends.send(b"small") == (Flag.CHECKED, b"small")
    data = bytes(REGION_BYTES + 1)
    assert ends.send(data) == (BY_TCP, data)


def test_the_end_that_was_asked_asks_too(ends: DistantEnds) -> None:
    until(lambda: ends.far._remote.takes(MIB), "the other direction")
    data = os.urandom(MIB)
    ends.far.send(Opcode.KV_PAGES, [data])
    until(lambda: bool(ends.here.frames), "the payload")
    assert (ends.here.frames[0][0].flags, ends.here.frames[0][1]) == (BY_RDMA, data)


def test_frames_of_another_epoch_are_dropped_and_their_room_is_free_again(ends: DistantEnds) -> None:
    ends.near.epoch = 1
    for _ in range(4):
        ends.near.send(Opcode.KV_PAGES, [bytes(REGION_BYTES // 2)])
    ends.near.epoch = 0
    until(lambda: ends.far.stats.stale == 4, "all of them")
    until(lambda: ends.near._remote.takes(REGION_BYTES), "room")
    data = os.urandom(MIB)
    assert ends.send(data) == (BY_RDMA, data)


def test_the_slower_way_is_not_taken(quicker: list[bool]) -> None:
    quicker[0] = False
    pair = DistantEnds()
    assert not pair.near.ask_for_rdma(LONGEST_WAIT_S)
    data = os.urandom(MIB)
    assert pair.send(data) == (BY_TCP, data)
    pair.close()


def no_card() -> Agent:
    raise OSError("there is no card")


@pytest.mark.parametrize(
    ("near", "far"), [(Here, no_agent), (Here, no_card), (no_agent, Here), (no_card, Here), (Damages, Here)]
)
def test_where_one_end_cannot_all_goes_over_the_connection(near: Callable[[], Agent], far: Callable[[], Agent]) -> None:
    pair = DistantEnds(near, far)
    assert not pair.near.ask_for_rdma(LONGEST_WAIT_S)
    data = os.urandom(MIB)
    assert pair.send(data) == (BY_TCP, data)
    pair.close()


def test_a_card_that_fails_costs_no_payload() -> None:
    agent = Fails()
    pair = DistantEnds(lambda: agent)
    assert pair.near.ask_for_rdma(LONGEST_WAIT_S)
    data = os.urandom(MIB)
    assert pair.send(data) == (BY_RDMA, data)
    agent.fails = True
    assert pair.send(data) == (BY_TCP, data)
    agent.fails = False
    assert pair.send(data) == (BY_TCP, data), "once is enough"
    pair.close()
    assert agent.closed


def test_a_write_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rdma, "_PATIENCE_S", 0.2)
    pair = DistantEnds(Stalls)
    assert not pair.near.ask_for_rdma(LONGEST_WAIT_S)
    data = os.urandom(MIB)
    assert pair.send(data) == (BY_TCP, data)
    pair.close()


def test_a_link_that_ends_keeps_nobody_waiting() -> None:
    pair = DistantEnds(Stalls)
    assert not pair.near.ask_for_rdma(0.01)
    pair.close()


# -- who may --------------------------------------------------------------------------------------------------------


def test_neither_one_host_nor_encryption_nor_a_machine_without_cards(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(rdma, "rdma_devices", lambda: ("mlx5_0",))
    monkeypatch.setattr(rdma, "is_installed", lambda: True)
    server = socket.create_server(("127.0.0.1", 0))
    sockets = [socket.create_connection(server.getsockname(), source_address=(f"127.0.0.{n}", 0)) for n in (1, 2)]

    class Encrypts:
        binding = b"x"

    ways = [agent_for(sock) for sock in (*sockets, Encrypts())]  # type: ignore[arg-type]
    assert ways[0] is no_agent and ways[2] is no_agent
    assert isinstance(ways[1], partial) and ways[1].func is NixlAgent and ways[1].args == (("mlx5_0",),)
    for name, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        (tmp_path / name / "ports" / "1").mkdir(parents=True)
        (tmp_path / name / "ports" / "1" / "state").write_text(state + "\n")
    (tmp_path / "odd").mkdir()
    assert rdma_devices(tmp_path) == ("mlx5_0",) and rdma_devices(tmp_path / "none") == ()
    monkeypatch.setattr(rdma, "is_installed", lambda: False)
    assert agent_for(sockets[1]) is no_agent
    for sock in (*sockets, server):
        sock.close()


# -- ends that do not keep to it --------------------------------------------------------------------------------------


def frame(opcode: Opcode, sequence: int, data: bytes = b"", flags: int = Flag.CHECKED, nbytes: int = 0) -> bytes:
    header = Header(opcode, flags, source=1, destination=2, sequence=sequence, nbytes=nbytes or len(data),
                    checksum=checksum((data,)))  # fmt: skip
    return write_header(header) + data


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        (frame(Opcode.KV_PAGES, 0, flags=BY_RDMA, nbytes=MIB) + bytes(8), "memory that was not offered"),
        (frame(Opcode.REACH, 0) + frame(Opcode.REACH, 1), "asked for a second time"),
        (frame(Opcode.REGION, 0, b"region"), "that nobody asked for"),
        (frame(Opcode.HEARTBEAT, 0, flags=BY_RDMA), "does not travel in shared memory"),
        (frame(Opcode.KV_PAGES, 0, flags=Flag.REMOTE, nbytes=MIB), "bits are set that mean nothing"),
    ],
)
def test_who_does_not_keep_to_it_is_left(said: bytes, complaint: str) -> None:
    ours, theirs = socket.socketpair()
    recorder = Recorder()
    link = Link(theirs, 2, 1, recorder, name="far", new_agent=no_agent)
    link.start()
    ours.sendall(said)
    until(lambda: bool(recorder.errors), "the objection")
    assert isinstance(recorder.errors[0], ProtocolError) and complaint in recorder.errors[0].message
    link.close()
    ours.close()


@pytest.mark.parametrize(("offset", "nbytes"), [(REGION_BYTES, MIB), (0, REGION_BYTES + 1)])
def test_what_is_not_within_the_region_is_refused(ends: DistantEnds, offset: int, nbytes: int) -> None:
    header = Header(Opcode.KV_PAGES, int(BY_RDMA), nbytes=nbytes, sequence=ends.near._sequence, source=1, destination=2)
    ends.near._socket.sendall(write_header(header) + offset.to_bytes(8, "little"))
    until(lambda: bool(ends.there.errors), "the objection")
    assert "not within a region" in ends.there.errors[0].message


def test_what_did_not_arrive_as_it_was_ends_the_link(ends: DistantEnds) -> None:
    header = Header(Opcode.KV_PAGES, int(BY_RDMA), nbytes=MIB, sequence=ends.near._sequence, source=1, destination=2,
                    checksum=1)  # fmt: skip
    ends.near._socket.sendall(write_header(header) + bytes(8))
    until(lambda: bool(ends.there.errors), "the objection")
    assert "checksum is wrong" in ends.there.errors[0].message and not ends.there.frames


# -- NIXL ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not is_installed(), reason="needs NIXL: pip install vramancer[rdma]")
def test_by_nixl(monkeypatch: pytest.MonkeyPatch) -> None:
    """By whichever way UCX has on this machine."""
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    pair = DistantEnds(lambda: NixlAgent(()), lambda: NixlAgent(()))
    assert pair.near.ask_for_rdma(LONGEST_WAIT_S)
    for nbytes in (LEAST_BYTES + 1, 3 * MIB + 77, 40 * MIB, 40 * MIB + 1):
        data = os.urandom(nbytes)
        until(partial(pair.near._remote.takes, nbytes), "room")
        assert pair.send(data) == (BY_RDMA, data)
    pair.close()


@pytest.mark.skipif(not is_installed(), reason="needs NIXL: pip install vramancer[rdma]")
def test_what_nixl_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    agent = NixlAgent(())
    with pytest.raises(OSError, match="NIXL"):
        agent.meet(b"not what an agent says")
    memory = np.zeros(4096, dtype=np.uint8)
    agent.register(memory)
    with pytest.raises(OSError, match="NIXL"):
        agent.write(memory.ctypes.data, 4096, "nobody", memory.ctypes.data)
    agent.close()
