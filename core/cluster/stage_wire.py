"""What crosses a link between the master and a stage, and between stages: frames from values, and values from frames.

::

    STEP     master -> stage       the record, and the stage's part of it
    HIDDEN   stage -> next         what it computed, `[1, T, hidden_size]`
    PASS     stage -> next         instead: the step moves pages and computes nothing
    SKIP     stage -> next         instead: how the step failed
    RESULTS  last stage -> master  what it sampled
    FAILED   last stage -> master  instead: how the step failed, wherever it did

Where the next stage is in the master's process, HIDDEN, PASS and FAILED go there. `layer` of a header is the number of
the stage that the frame is for, or, on the way to the master, from.
"""

from __future__ import annotations

import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from core.cluster.failures import Failure, encode_failure
from core.cluster.group_path import GroupPath, Means
from core.cluster.tensors import buffer_for, payload_of
from core.devices import Device
from core.errors import NetworkError, ProtocolError, RecordError
from core.execution.codec import decode, encode
from core.execution.records import StepOutput, StepRecord
from core.kv_cache.page_ops import StagePart
from core.network.echo import Echo
from core.network.frames import Header, Opcode
from core.network.link import Link

_LENGTH = struct.Struct("<I")


def send_step(link: Link, stage: int, record: bytes, step: int, part: StagePart) -> None:
    """`record` is encoded: it is the same for all stages."""
    parts = [_LENGTH.pack(len(record)), record, encode(part)]
    link.send(Opcode.STEP, parts, step=step, layer=stage)


def read_step(payload: memoryview) -> tuple[StepRecord, StagePart]:
    """Raises `ProtocolError`."""
    if len(payload) < _LENGTH.size:
        raise ProtocolError("STEP without a record")
    (length,) = _LENGTH.unpack(payload[: _LENGTH.size])
    record, part = payload[_LENGTH.size :][:length], payload[_LENGTH.size + length :]
    try:
        return decode(bytes(record), StepRecord), decode(bytes(part), StagePart)
    except RecordError as error:
        raise ProtocolError(error.message) from error


def read_results(payload: memoryview) -> StepOutput:
    """Raises `ProtocolError`."""
    try:
        return decode(bytes(payload), StepOutput)
    except RecordError as error:
        raise ProtocolError(error.message) from error


def send_results(link: Link, stage: int, output: StepOutput) -> None:
    link.send(Opcode.RESULTS, [encode(output)], step=output.step, layer=stage)


def send_failure(link: Link, opcode: Opcode, stage: int, step: int, failure: Failure) -> None:
    """`FAILED` to the master, or `SKIP` to the next stage."""
    link.send(opcode, [encode_failure(failure)], step=step, layer=stage)


T = TypeVar("T")


class StageEnd(ABC, Generic[T]):
    """One end of a link whose frames are for stages, by their number: which frames are taken, and where tensors go.
    `echo` answers measurements, and makes them."""

    def __init__(self, stages: Mapping[int, T], takes: frozenset[Opcode], means: Means | None = None) -> None:
        self.stages = stages
        self.echo = Echo()
        self.path = GroupPath(means)
        self._takes = takes
        self._tensors: dict[int, torch.Tensor] = {}

    def attach(self, link: Link) -> None:
        """The link that this is an end of, before it starts."""
        self.echo.attach(link)
        self.path.attach(link)
        link.elsewhere = self.announced

    def buffer_for(self, header: Header) -> memoryview | None:
        """See `LinkHandler`."""
        if not self._is_for_stage(header) or header.opcode is not Opcode.HIDDEN:
            return None
        self._tensors[header.sequence], buffer = buffer_for(header)
        return buffer

    def announced(self, header: Header, keep: bool) -> None:
        """See `Link.elsewhere`."""
        if self._is_for_stage(header) and header.opcode is not Opcode.HIDDEN:
            raise ProtocolError(f"{header.opcode.name} without its payload")
        tensor = self.path.receive(header)
        if keep:
            self._tensors[header.sequence] = tensor

    def _is_for_stage(self, header: Header) -> bool:
        """Or for what measures. Raises `ProtocolError` if it is for nobody here."""
        if self.echo.takes(header) or header.opcode is Opcode.GROUP:
            return False
        if header.opcode not in self._takes:
            raise ProtocolError(f"{header.opcode.name} is not taken here")
        if header.layer not in self.stages:
            raise ProtocolError(f"{header.opcode.name} of stage {header.layer}, which is not there")
        return True

    def received(self, header: Header, payload: memoryview) -> bool:
        """See `LinkHandler`."""
        if self.echo.takes(header):
            self.echo.take(header, payload)
        elif header.opcode is Opcode.GROUP:
            self.path.take(header, payload, self._tensors.pop(header.sequence, None))
        else:
            self.take(self.stages[header.layer], header, payload)
        return True

    def end(self, error: NetworkError) -> None:
        """The link has ended: who measures is told, and who waits for a tensor."""
        self.echo.lose(error)
        self.path.lose(error)

    @abstractmethod
    def take(self, stage: T, header: Header, payload: memoryview) -> None:
        """A frame for a stage that is here."""

    def tensor(self, header: Header) -> torch.Tensor:
        """The hidden states that have come."""
        return self._tensors.pop(header.sequence)


@dataclass(frozen=True, slots=True)
class RemoteInlet:
    """Where hidden states leave for a stage on another node; they have to be on `device`: in main memory, or where
    the `path` takes them, and then `moved` hears of their bytes, and of the seconds until they were on their way."""

    link: Link
    stage: int
    device: Device
    path: GroupPath | None = None
    moved: Callable[[int, float], None] | None = None

    def put(self, step: int, hidden: torch.Tensor) -> None:
        if self.path is not None and hidden.device == self.path.device:
            began_s = time.perf_counter()
            self.path.send(Opcode.HIDDEN, hidden.contiguous(), step=step, layer=self.stage)
            if self.moved is not None:
                self.moved(hidden.nbytes, time.perf_counter() - began_s)
            return
        data, dtype, shape = payload_of(hidden)
        self.link.send(Opcode.HIDDEN, [data], step=step, layer=self.stage, dtype=dtype, shape=shape)
