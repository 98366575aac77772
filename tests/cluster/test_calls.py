"""Calls over a link: answers, errors of every kind, ends, and what is no call."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch
from steering import LONGEST_WAIT_S, until

from core import errors
from core.cluster.calls import CallEnd, fault_of, raised_by
from core.cluster.message_types import Nothing
from core.cluster.messages import Call, Chunk, Epoch, ReadFile, Refuse, Report, StageUse
from core.devices.readings import DeviceReading
from core.errors import (
    DeviceLostError,
    InsufficientMemoryError,
    LinkLostError,
    ModelNotFoundError,
    NetworkError,
    OutOfDeviceMemoryError,
    ProtocolError,
    VRAMancerError,
)
from core.network.frames import Header, Opcode
from core.network.link import Link


class Ends:
    """A master's end, which asks `Call`s, and a worker's, which may ask for files."""

    def __init__(self, serve: Callable[[Any], msgspec.Struct]) -> None:
        sockets = socket.socketpair()
        self.lost: list[NetworkError] = []
        self.reports: list[Report] = []
        self.near = CallEnd(
            ReadFile, lambda asked: Chunk(asked.name.encode()), self.lost.append, "near", self.reports.append
        )
        self.far = CallEnd(Call, serve, lambda error: None, "far")
        self.links = [
            Link(sockets[0], 1, 2, self.near, name="desk"), Link(sockets[1], 2, 1, self.far, name="master")
        ]  # fmt: skip
        for end, link in zip((self.near, self.far), self.links, strict=True):
            end.attach(link)
            link.start()

    def close(self) -> None:
        for link in self.links:
            link.close()
        self.near.close()
        self.far.close()


@pytest.fixture
def open_ends() -> Iterator[Callable[..., Ends]]:
    opened: list[Ends] = []

    def start(serve: Callable[[Any], msgspec.Struct] = lambda asked: Nothing()) -> Ends:
        opened.append(Ends(serve))
        return opened[-1]

    yield start
    for ends in opened:
        ends.close()


def test_both_sides_ask(open_ends: Callable[..., Ends]) -> None:
    asked: list[Any] = []

    def serve(request: Any) -> msgspec.Struct:
        asked.append(request)
        # while it serves, it may ask itself
        asked.append(ends.far.call(ReadFile("a" * 32, "config.json", 0, 5), Chunk))
        return Nothing()

    ends = open_ends(serve)
    assert ends.near.call(Epoch(3), Nothing) == Nothing()
    assert asked == [Epoch(3), Chunk(b"config.json")]


RAISED = [
    (ModelNotFoundError("there is none"), ModelNotFoundError),
    (OutOfDeviceMemoryError("no room"), OutOfDeviceMemoryError),
    (MemoryError("no room"), OutOfDeviceMemoryError),
    (torch.OutOfMemoryError("no room"), OutOfDeviceMemoryError),
    (KeyError("what"), VRAMancerError),
    (DeviceLostError("gone", device="cuda:0"), VRAMancerError),  # which says what is lost here, not there
]


@pytest.mark.parametrize(("error", "kind"), RAISED, ids=lambda each: getattr(each, "__name__", type(each).__name__))
def test_errors_arrive_as_what_they_are(open_ends: Callable[..., Ends], error: Exception, kind: type) -> None:
    def serve(request: Any) -> msgspec.Struct:
        raise error

    with pytest.raises(VRAMancerError) as caught:
        open_ends(serve).near.call(Epoch(1), Nothing)
    assert type(caught.value) is kind
    assert caught.value.message.startswith("desk: ") and (error.args[0] in caught.value.message)


def test_what_memory_lacks_arrives_too() -> None:
    error = raised_by(fault_of(InsufficientMemoryError("too little", lacking_bytes={"cpu": 5})), "desk")
    assert isinstance(error, InsufficientMemoryError) and error.lacking_bytes == {"cpu": 5}


@pytest.mark.parametrize("kind", [name for name in dir(errors) if not name.startswith("__")])
def test_no_kind_makes_anything_but_an_error_of_ours(kind: str) -> None:
    fault = fault_of(VRAMancerError("no"))
    assert isinstance(raised_by(msgspec.structs.replace(fault, kind=kind), "desk"), VRAMancerError)


def test_an_answer_that_does_not_come_in_time(open_ends: Callable[..., Ends]) -> None:
    gate = threading.Event()

    def serve(request: Any) -> msgspec.Struct:
        if request == Epoch(1):
            assert gate.wait(LONGEST_WAIT_S)
        return Nothing()

    ends = open_ends(serve)
    with pytest.raises(LinkLostError, match=r"no answer to Epoch within 0\.05 s"):
        ends.near.call(Epoch(1), Nothing, timeout_s=0.05)
    gate.set()
    assert ends.near.call(Epoch(2), Nothing) == Nothing()  # the late answer was nobody's


def test_whoever_waits_hears_of_the_end(open_ends: Callable[..., Ends]) -> None:
    begun, gate = threading.Event(), threading.Event()

    def serve(request: Any) -> msgspec.Struct:
        begun.set()
        assert gate.wait(LONGEST_WAIT_S)
        return Nothing()

    ends = open_ends(serve)
    caught: list[Exception] = []

    def ask() -> None:
        try:
            ends.near.call(Epoch(1), Nothing, timeout_s=None)
        except LinkLostError as error:
            caught.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    assert begun.wait(LONGEST_WAIT_S)
    ends.links[1].close("pulled out")
    thread.join()
    gate.set()
    assert "pulled out" in str(caught[0]) and "pulled out" in ends.lost[0].message
    with pytest.raises(LinkLostError):
        ends.near.call(Epoch(2), Nothing)


@pytest.mark.parametrize(
    "payload",
    [b"", b"\xc1", b"\x81\xa4typ\xe2", msgspec.msgpack.encode({"type": "Open", "path": "/"}),
     msgspec.msgpack.encode({"type": "Epoch"}),
     msgspec.msgpack.encode({"type": "Epoch", "epoch": -1}), msgspec.msgpack.encode(["Epoch", 1])],
)  # fmt: skip
def test_what_is_no_call_ends_the_link(open_ends: Callable[..., Ends], payload: bytes) -> None:
    ends = open_ends()
    ends.links[0].send(Opcode.CALL, [payload], step=1)
    until(lambda: ends.lost, "the end")
    assert "a call cannot be read" in ends.lost[0].message


def test_a_master_is_asked_for_files_alone(open_ends: Callable[..., Ends]) -> None:
    ends = open_ends()
    ends.links[1].send(Opcode.CALL, [msgspec.msgpack.encode(Refuse("me"))], step=1)
    until(lambda: ends.lost, "the end")
    with pytest.raises(ProtocolError, match="HIDDEN is not taken here"):
        ends.near.buffer_for(Header(Opcode.HIDDEN))


def test_answers_that_cannot_be_read(open_ends: Callable[..., Ends]) -> None:
    ends = open_ends(lambda request: Chunk(b"what"))
    with pytest.raises(ProtocolError, match="an answer cannot be read"):
        ends.near.call(Epoch(1), Nothing)


def test_reports_are_taken_where_somebody_hears_them(open_ends: Callable[..., Ends]) -> None:
    ends, report = open_ends(), Report((DeviceReading("cpu", used_bytes=5),), (StageUse(3, 7, 0.5, 0.25),))
    ends.links[1].send(Opcode.REPORT, [msgspec.msgpack.encode(report)])
    until(lambda: ends.reports, "the report")
    assert ends.reports == [report]
    with pytest.raises(ProtocolError, match="REPORT is not taken here"):
        ends.far.buffer_for(Header(Opcode.REPORT))


@pytest.mark.parametrize(
    "payload",
    [b"", b"\xc1", b"\x81\xa4typ\xe2", msgspec.msgpack.encode({"readings": 1}),
     msgspec.msgpack.encode({"stages": [{"stage": -1}]}),
     msgspec.msgpack.encode({"more": []}), msgspec.msgpack.encode(Report((DeviceReading("cpu"),) * 65))],
)  # fmt: skip
def test_what_is_no_report_ends_the_link(open_ends: Callable[..., Ends], payload: bytes) -> None:
    ends = open_ends()
    ends.links[1].send(Opcode.REPORT, [payload])
    until(lambda: ends.lost, "the end")
    assert "a report cannot be read" in ends.lost[0].message
