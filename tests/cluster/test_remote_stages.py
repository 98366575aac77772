"""Stages on nodes: the order of steps, how failures come back, and what a lost link means."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from cluster.nodes import connect_stages
from steering import LONGEST_WAIT_S, until

from core.cluster.hosted_stage import NodeEnd
from core.cluster.remote_stage import MasterEnd
from core.cluster.tensors import buffer_for, payload_of
from core.devices import Device
from core.errors import (
    DeviceLostError,
    OutOfDeviceMemoryError,
    PageMoveError,
    ProtocolError,
    RecordError,
    StepFailedError,
    VRAMancerError,
)
from core.execution.model_runner import ModelRunner
from core.execution.records import SampledToken, SchedulerOutput, StageReport, StepOutput, StepRecord, ints, longs
from core.kv_cache.page_ops import StagePart
from core.network.frames import DTYPES, Flag, Header, Opcode
from core.network.link import Link
from core.transfer import TransferManager


class Adds:
    """A stage that adds its number to what it is given. `errors`: raised by what it does in a step."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.devices = (Device(f"node-{number}", number, "cpu", "cpu", 1 << 20),)
        self.outlet = self.devices[0]
        self.inlet = self
        self.device = self.devices[0]
        self.errors: dict[tuple[str, int], Exception] = {}
        self.gate: threading.Event | None = None
        self.done: list[tuple[str, int]] = []
        self._begun: dict[int, StepRecord] = {}
        self._hidden: dict[int, torch.Tensor] = {}

    def _note(self, what: str, step: int) -> None:
        self.done.append((what, step))
        if (what, step) in self.errors:
            raise self.errors[what, step]

    def overlap(self, several: bool) -> None: ...

    def begin(self, record: StepRecord, part: StagePart) -> None:
        self._begun[record.step] = record
        if ("begin", record.step) in self.errors:
            raise self.errors["begin", record.step]

    def put(self, step: int, hidden: torch.Tensor) -> None:
        self._hidden[step] = hidden

    def run(self, step: int) -> None:
        if self.gate is not None:
            assert self.gate.wait(LONGEST_WAIT_S)
        record = self._begun.pop(step)
        came = self._hidden.pop(step, None)
        self._note("run", step)
        if record.num_sequences:
            zero = torch.zeros(1, record.num_tokens, 3) if self.number == 0 else came
            assert zero is not None
            self._hidden[step] = zero + self.number + 1

    def hand_on(self, step: int, inlet: Any) -> None:
        if step in self._hidden:
            inlet.put(step, self._hidden.pop(step))

    def results(self, step: int) -> StepOutput:
        if step not in self._hidden:
            return StepOutput(step)
        return StepOutput(step, {1: SampledToken(int(self._hidden.pop(step)[0, 0, 0]))})

    def skip(self, step: int) -> None:
        self._hidden.pop(step, None)
        self._begun.pop(step, None)
        self._note("skip", step)

    def seconds(self, step: int) -> float:
        return 0.0

    def report(self) -> StageReport:
        return StageReport()

    def free(self) -> None: ...


class Line:
    """Three stages, of which `which` are on nodes, and a runner."""

    def __init__(self, which: Sequence[int]) -> None:
        self.stages = [Adds(number) for number in range(3)]
        self.nodes, handles = connect_stages(self.stages, which)
        self.runner = ModelRunner(handles, TransferManager())

    def step(self, number: int) -> SchedulerOutput:
        """Two tokens of one sequence; step 0 moves pages alone."""
        if number == 0:
            return SchedulerOutput(StepRecord(0))
        return SchedulerOutput(StepRecord(number, longs([1]), ints([0]), ints([2]), ints([0]), flags(1)))

    def run(self, number: int) -> StepOutput:
        return self.runner.execute(self.step(number))

    def close(self) -> None:
        for stage in self.stages:
            if stage.gate is not None:
                stage.gate.set()
        self.runner.close()
        self.nodes.close()


def flags(count: int) -> Any:
    import numpy as np

    return np.zeros(count, dtype=np.uint8)


WHERE = [(0, 1, 2), (0,), (1,), (2,), (0, 1), (1, 2), (0, 2)]


@pytest.fixture(params=WHERE, ids=lambda which: "nodes-" + "".join(map(str, which)))
def line(request: pytest.FixtureRequest) -> Iterator[Line]:
    made = Line(request.param)
    yield made
    made.close()


SUM = 1 + 2 + 3


def test_steps_one_at_a_time(line: Line) -> None:
    assert [line.run(number).sampled for number in (0, 1, 2)] == [{}, {1: (SUM, None)}, {1: (SUM, None)}]
    assert all(stage.done == [("run", 0), ("run", 1), ("run", 2)] for stage in line.stages)


def submit(line: Line, numbers: Sequence[int]) -> list[StepOutput | Exception]:
    ended: list[StepOutput | Exception] = []
    for number in numbers:
        line.runner.submit(line.step(number), lambda _, result: ended.append(result))
    until(lambda: len(ended) == len(numbers), "all steps")
    return ended


def test_steps_in_flight_come_out_in_order(line: Line) -> None:
    ended = submit(line, range(50))
    assert [output.step for output in ended if isinstance(output, StepOutput)] == list(range(50))
    assert all(output.sampled == {1: (SUM, None)} for output in ended[1:] if isinstance(output, StepOutput))
    assert all(stage.done == [("run", number) for number in range(50)] for stage in line.stages)


ERRORS = [
    (RuntimeError("a kernel failed"), StepFailedError),
    (OutOfDeviceMemoryError("it is full"), OutOfDeviceMemoryError),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), OutOfDeviceMemoryError),
    (DeviceLostError("it fell off the bus", device="node-1"), DeviceLostError),
    (PageMoveError("a page stayed"), PageMoveError),
]


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize(("error", "raised"), ERRORS)
def test_a_step_that_fails_is_skipped_behind_and_the_next_one_goes_on(
    line: Line, failing: int, error: Exception, raised: type[Exception]
) -> None:
    line.stages[failing].errors["run", 1] = error
    with pytest.raises((raised, type(error))):
        line.run(1)
    assert line.run(2).sampled == {1: (SUM, None)}
    for stage in line.stages:
        first = "run" if stage.number <= failing else "skip"
        assert stage.done == [(first, 1), ("run", 2)]


def test_a_failure_in_flight_is_that_step_s_alone(line: Line) -> None:
    line.stages[1].errors["run", 2] = RuntimeError("a kernel failed")
    ended = submit(line, range(1, 6))
    assert [isinstance(result, StepOutput) for result in ended] == [True, False, True, True, True]
    assert "a kernel failed" in str(ended[1])


def test_pages_that_stayed_behind_a_failure_count_for_more(line: Line) -> None:
    line.stages[0].errors["run", 1] = RuntimeError("a kernel failed")
    line.stages[2].errors["skip", 1] = PageMoveError("a page stayed")
    (result,) = submit(line, [1])
    assert isinstance(result, PageMoveError)


def test_a_record_that_does_not_follow_fails_its_step() -> None:
    made = Line((0, 1, 2))
    made.stages[1].errors["begin", 1] = RecordError("step 1 computes sequence 1, which has not been told")
    with pytest.raises(StepFailedError, match="has not been told"):
        made.run(1)
    assert made.run(2).sampled == {1: (SUM, None)}
    assert not made.nodes.hosted[1]._arrived, "what had come for the step is not kept"
    assert [stage.report().forwards for stage in made.runner.stages] == [2, 2, 2]
    made.close()


@pytest.mark.parametrize("several", [False, True])
def test_a_link_that_breaks_is_a_device_that_is_lost(several: bool) -> None:
    made = Line((0, 1, 2))
    made.stages[1].gate = threading.Event()
    ended: list[Any] = []

    def run() -> None:
        try:
            ended.extend(submit(made, [1]) if several else [made.run(1)])
        except VRAMancerError as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: made.stages[0].done, "the first stage has computed")
    made.nodes.links[2].close("the node has gone")
    thread.join()
    (error,) = ended
    assert isinstance(error, DeviceLostError) and error.device == "node-2" and "the node has gone" in error.message
    if several:  # told in the same way, not raised where the engine would end by it
        (again,) = submit(made, [2])
        assert isinstance(again, DeviceLostError)
    else:
        with pytest.raises(DeviceLostError):
            made.run(2)
    made.close()


def test_a_device_that_fails_there_has_its_name_in_the_cluster() -> None:
    """A node calls it `cpu`, as the master calls one of its own."""
    made = Line((0, 1, 2))
    made.stages[1].errors["run", 1] = DeviceLostError("it does not answer", device="cpu")
    with pytest.raises(DeviceLostError) as lost:
        made.run(1)
    assert lost.value.device == "node-1"
    made.close()


# -- what ends that are not ours might send ----------------------------------------------------------------------------


MEASURES = (Opcode.ECHO, Opcode.ECHOED, Opcode.GROUP)
"""And agrees on other ways: for no stage."""


@pytest.mark.parametrize("end", [MasterEnd({}), NodeEnd({}, lambda error: None)])
@pytest.mark.parametrize("opcode", [opcode for opcode in Opcode if opcode >= Opcode.CALL and opcode not in MEASURES])
def test_frames_that_nobody_waits_for_are_refused(end: Any, opcode: Opcode) -> None:
    with pytest.raises(ProtocolError):
        end.buffer_for(Header(opcode, dtype="float32", shape=(1,), nbytes=4))


def test_hidden_states_are_tensors() -> None:
    with pytest.raises(ProtocolError, match="HIDDEN is a tensor, not bytes"):
        buffer_for(Header(Opcode.HIDDEN, nbytes=4))


def test_a_step_that_is_garbage_ends_the_link() -> None:
    made = Line((0,))
    made.nodes.links[0].send(Opcode.STEP, [b"\xff\xff\xff\xff garbage"], step=1, layer=0)
    until(lambda: made.nodes.links[0].error is not None, "the end of the link")
    made.close()


@pytest.mark.parametrize("name", sorted(set(DTYPES) - {"bytes"}))
def test_tensors_of_every_dtype_arrive_as_they_were(name: str) -> None:
    tensor = (torch.arange(24) - 12).to(getattr(torch, name)).reshape(1, 4, 6)
    data, dtype, shape = payload_of(tensor)
    header = Header(Opcode.HIDDEN, Flag.CHECKED, dtype=dtype, shape=shape, nbytes=len(data))
    other, buffer = buffer_for(header)
    buffer[:] = data
    assert other.dtype is tensor.dtype and torch.equal(other.view(torch.uint8), tensor.view(torch.uint8))
    turned = tensor.transpose(1, 2)
    assert bytes(payload_of(turned)[0]) == bytes(payload_of(turned.contiguous())[0])


def test_an_empty_payload() -> None:
    ours, theirs = socket.socketpair()
    taken: list[Header] = []

    class End(MasterEnd):
        def buffer_for(self, header: Header) -> memoryview | None:
            return buffer_for(header)[1]

        def received(self, header: Header, payload: memoryview) -> bool:
            taken.append(header)
            return True

    here, there = Link(ours, 1, 2, End({}), name="here"), Link(theirs, 2, 1, End({}), name="there")
    here.start()
    there.start()
    data, dtype, shape = payload_of(torch.zeros(1, 0, 8))
    here.send(Opcode.HIDDEN, [data], dtype=dtype, shape=shape)
    until(lambda: taken, "the frame")
    assert taken[0].shape == (1, 0, 8)
    here.close()
    there.close()
