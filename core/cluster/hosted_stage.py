"""A stage in this process that a master on another node drives.

Steps are told by the master, hidden states come from the stage before, over another link and in their own time.
Whichever thread brings the last thing that a step lacks computes it, and whatever follows that lacks nothing: no thread
waits, and none is woken. One at a time, in the order in which steps were told.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from core.cluster.failures import Failure, decode_failure, failure_of
from core.cluster.group_path import Means
from core.cluster.stage_wire import RemoteInlet, StageEnd, read_step, send_failure, send_results
from core.errors import NetworkError, RecordError
from core.execution.records import StepOutput, StepRecord
from core.execution.stage_handle import StageHandle
from core.kv_cache.page_ops import StagePart
from core.network.frames import Header, Opcode
from core.network.link import Link


class Outlet(Protocol):
    """Where a step goes on from here."""

    @property
    def link(self) -> Link: ...

    def done(self, stage: StageHandle, step: int, computed: bool) -> None:
        """It is over here; `computed`: not only its pages were moved."""

    def failed(self, step: int, failure: Failure) -> None: ...


class ToNextStage:
    """A stage on another node."""

    def __init__(self, inlet: RemoteInlet) -> None:
        self._inlet = inlet
        self.link = inlet.link

    def done(self, stage: StageHandle, step: int, computed: bool) -> None:
        _hand_on(stage, step, self._inlet, computed)

    def failed(self, step: int, failure: Failure) -> None:
        send_failure(self._inlet.link, Opcode.SKIP, self._inlet.stage, step, failure)


class ToMaster:
    """The last stage's results, or what a stage in the master's own process is to compute on."""

    def __init__(self, link: Link, stage: int, inlet: RemoteInlet | None = None) -> None:
        self.link, self._stage, self._inlet = link, stage, inlet

    def done(self, stage: StageHandle, step: int, computed: bool) -> None:
        if self._inlet is not None:
            _hand_on(stage, step, self._inlet, computed)
            return
        output: StepOutput = stage.results(step)
        send_results(self.link, self._stage, output)

    def failed(self, step: int, failure: Failure) -> None:
        send_failure(self.link, Opcode.FAILED, self._stage, step, failure)


def _hand_on(stage: StageHandle, step: int, inlet: RemoteInlet, computed: bool) -> None:
    if computed:
        stage.hand_on(step, inlet)
    else:
        inlet.link.send(Opcode.PASS, step=step, layer=inlet.stage)


class HostedStage:
    """See the module. `takes_hidden`: it is not the first stage. `called` is its device's name in the cluster."""

    def __init__(self, stage: StageHandle, outlet: Outlet, *, takes_hidden: bool, called: str) -> None:
        self.stage = stage
        self._outlet = outlet
        self._takes_hidden = takes_hidden
        self._called = called
        self._lock = threading.Condition()
        self._steps: deque[tuple[int, bool, Failure | None]] = deque()  # whether it computes; why it was not begun
        self._arrived: dict[int, torch.Tensor | Failure | None] = {}
        self._busy = False

    @property
    def is_cut_off(self) -> bool:
        """Whether what it computes cannot be sent on."""
        return self._outlet.link.error is not None

    def tell(self, record: StepRecord, part: StagePart) -> None:
        """The master's word. A record that does not follow on those before is a step that fails."""
        refused: Failure | None = None
        try:
            self.stage.begin(record, part)
        except RecordError as error:
            refused = failure_of(error, self._called)
        with self._lock:
            self._steps.append((record.step, record.num_sequences > 0, refused))
        self._advance()

    def arrive(self, step: int, what: torch.Tensor | Failure | None) -> None:
        """Hidden states, or how the step failed before; None if there is nothing to compute."""
        with self._lock:
            self._arrived[step] = what
        self._advance()

    def _advance(self) -> None:
        while True:
            with self._lock:
                if self._busy or not self._steps:
                    return
                step, computes, refused = self._steps[0]
                if self._takes_hidden and step not in self._arrived:
                    return
                self._steps.popleft()
                arrived = self._arrived.pop(step, None)
                self._busy = True
            try:
                if refused is not None:
                    self._outlet.failed(step, refused)
                else:
                    self._run(step, arrived, computes)
            finally:
                with self._lock:
                    self._busy = False
                    self._lock.notify_all()

    def wait_until_idle(self) -> None:
        """Until nothing is computed here; no more is told. Steps that still lack something stay."""
        with self._lock:
            self._steps.clear()
            self._lock.wait_for(lambda: not self._busy)

    def _run(self, step: int, arrived: torch.Tensor | Failure | None, computes: bool) -> None:
        failure = arrived if isinstance(arrived, Failure) else None
        try:
            if failure is not None:
                self.stage.skip(step)
            else:
                if isinstance(arrived, torch.Tensor):
                    inlet = self.stage.inlet
                    inlet.put(step, arrived.to(inlet.device.torch_device))
                self.stage.run(step)
                self._outlet.done(self.stage, step, computes)
        except Exception as error:  # noqa: BLE001  travels with the step to the master
            found = failure_of(error, self._called)
            if failure is None or found.kind == "pages":  # which harms more than this step
                failure = found
        if failure is not None:
            self._outlet.failed(step, failure)


_TAKES = frozenset({Opcode.STEP, Opcode.HIDDEN, Opcode.PASS, Opcode.SKIP})


class NodeEnd(StageEnd[HostedStage]):
    """A node's end of a link, to the master or to another node: gives frames to the stages here. A `LinkHandler`;
    `on_lost` hears of the end."""

    def __init__(
        self, stages: Mapping[int, HostedStage], on_lost: Callable[[NetworkError], None], means: Means | None = None
    ) -> None:
        super().__init__(stages, _TAKES, means)
        self._on_lost = on_lost

    def lost(self, error: NetworkError) -> None:
        """See `LinkHandler`."""
        self.end(error)
        self._on_lost(error)

    def take(self, stage: HostedStage, header: Header, payload: memoryview) -> None:
        if header.opcode is Opcode.HIDDEN:
            stage.arrive(header.step, self.tensor(header))
        elif header.opcode is Opcode.PASS:
            stage.arrive(header.step, None)
        elif header.opcode is Opcode.SKIP:
            stage.arrive(header.step, decode_failure(payload))
        else:
            stage.tell(*read_step(payload))
