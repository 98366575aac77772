"""A stage on another node, as the runner knows stages: `StageHandle` over a link.

What a stage on a node computes goes to the next stage without passing here, if that is on a node too. So `run` has
nothing to do, and `hand_on` waits only where the next stage is in this process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import torch

from core.cluster.failures import Failure, decode_failure, error_of
from core.cluster.group_path import GroupPath, Means
from core.cluster.stage_wire import RemoteInlet, StageEnd, read_results, send_failure, send_step
from core.devices import Device
from core.errors import (
    DeviceLostError,
    NetworkError,
    PageMoveError,
    VRAMancerError,
)
from core.execution.codec import encode
from core.execution.records import StageReport, StepOutput, StepRecord
from core.execution.stage_handle import Inlet
from core.kv_cache.page_ops import StagePart
from core.logs import get_logger
from core.network.frames import Header, Opcode
from core.network.link import Link

logger = get_logger(__name__)

_SKIPPED = Failure("failed", "an earlier stage failed", "")


class RecordEncoder:
    """Encodes a step's record once for all the stages that are told of it."""

    def __init__(self) -> None:
        self._last: tuple[StepRecord | None, bytes] = (None, b"")

    def __call__(self, record: StepRecord) -> bytes:
        if self._last[0] is not record:
            self._last = record, encode(record)
        return self._last[1]


class RemoteStage:
    """Stage `number`, on the node at the other end of `link`, whose device is `device` here.

    `entrance` is where hidden states leave for it: in main memory, or where the `path` takes them. `fed_here`: the
    stage before it is in this process. `tells_here`: it is the last, or the stage after it is in this process. What
    arrives for the stage is given to `take` in the thread that reads the link.
    """

    def __init__(
        self, link: Link, number: int, device: Device, entrance: Device, encoder: RecordEncoder, *, fed_here: bool,
        tells_here: bool, path: GroupPath | None = None, moved: Callable[[int, float], None] | None = None,
    ) -> None:  # fmt: skip
        self.number = number
        self._fed_here, self._tells_here = fed_here, tells_here
        self._link = link
        self._device = device
        self._inlet = RemoteInlet(link, number, entrance, path, moved)
        self._encode = encoder
        self._came: dict[int, StepOutput | torch.Tensor | Failure | None] = {}
        self._changed = threading.Condition()
        self._computing: dict[int, bool] = {}
        self._forwards = 0
        self._lost: DeviceLostError | None = None
        self._behind: tuple[RemoteStage, ...] = ()

    @property
    def devices(self) -> Sequence[Device]:
        return (self._device,)

    @property
    def inlet(self) -> RemoteInlet:
        return self._inlet

    @property
    def outlet(self) -> Device:
        return self._inlet.device

    def overlap(self, several: bool) -> None:
        """The node's threads are its own."""

    def begin(self, record: StepRecord, part: StagePart) -> None:
        computes = self._computing[record.step] = record.num_sequences > 0
        self._forwards += computes
        with _LossOf(self._device):
            send_step(self._link, self.number, self._encode(record), record.step, part)

    def run(self, step: int) -> None:
        """The node computes by itself, once it has what the stage before computed."""
        if self._fed_here and not self._computing[step]:
            with _LossOf(self._device):
                self._link.send(Opcode.PASS, step=step, layer=self.number)

    def hand_on(self, step: int, inlet: Inlet) -> None:
        """To a stage in this process. Raises what the step failed with, here or on a node before."""
        del self._computing[step]
        if self._tells_here:  # else the node sends it there itself
            hidden = self._next(step)
            if isinstance(hidden, torch.Tensor):
                inlet.put(step, hidden.to(inlet.device.torch_device))

    def results(self, step: int) -> StepOutput:
        del self._computing[step]
        output = self._next(step)
        assert isinstance(output, StepOutput)
        return output

    def skip(self, step: int) -> None:
        """A stage before it failed. Nodes tell each other; what they have to say of pages is waited for."""
        del self._computing[step]
        if self._fed_here:
            with _LossOf(self._device):
                send_failure(self._link, Opcode.SKIP, self.number, step, _SKIPPED)
        if self._tells_here:
            try:
                self._next(step)
            except PageMoveError:
                raise
            except VRAMancerError:
                logger.debug("a step was skipped", step=step, device=self._device.name)

    def seconds(self, step: int) -> float:
        """Not known here."""
        return 0.0

    def report(self) -> StageReport:
        """How often it was told to compute; what that took is the node's to say."""
        return StageReport(forwards=self._forwards)

    def free(self) -> None:
        """Weights and pages are the node's."""

    # -- the link's thread ------------------------------------------------------------------------------------------

    def take(self, header: Header, what: torch.Tensor | memoryview) -> None:
        """A frame of this stage has come. Raises `ProtocolError`."""
        come: StepOutput | torch.Tensor | Failure | None
        if isinstance(what, torch.Tensor):
            come = what
        elif header.opcode is Opcode.PASS:
            come = None
        elif header.opcode is Opcode.RESULTS:
            come = read_results(what)
        else:
            come = decode_failure(what)
        with self._changed:
            self._came[header.step] = come
            self._changed.notify_all()

    def precedes(self, behind: Sequence[RemoteStage]) -> None:
        """What is computed there has been computed here before."""
        self._behind = tuple(behind)

    def lose(self, error: NetworkError) -> None:
        """The link has ended: whoever waits, or comes to, is told; so is who waits for stages behind this one, which
        get nothing from here any more."""
        name = self._device.name
        lost = DeviceLostError(f"{name}: {error.message}", device=name)
        for stage in (self, *self._behind):
            stage.expect_no_more(lost)

    def expect_no_more(self, lost: DeviceLostError) -> None:
        """Of steps that have not come by now."""
        with self._changed:
            self._lost = self._lost or lost
            self._changed.notify_all()
        self._link.wake()

    def _next(self, step: int) -> StepOutput | torch.Tensor | None:
        """What has come of a step."""
        self._link.wait_for(lambda: step in self._came or self._lost is not None, self._changed)
        with self._changed:
            if step not in self._came:
                assert self._lost is not None
                raise DeviceLostError(self._lost.message, device=self._lost.device) from self._lost
            what = self._came.pop(step)
        if isinstance(what, Failure):
            raise error_of(what)
        return what


class _LossOf:
    """A link that has ended is a device that is gone."""

    __slots__ = ("_device",)

    def __init__(self, device: Device) -> None:
        self._device = device

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, NetworkError):
            name = self._device.name
            raise DeviceLostError(f"{name}: {error.message}", device=name) from error


_TAKES = frozenset({Opcode.HIDDEN, Opcode.PASS, Opcode.RESULTS, Opcode.FAILED})


class MasterEnd(StageEnd[RemoteStage]):
    """The master's end of a link to a node: gives frames to the stages there, which come and go. A `LinkHandler`."""

    def __init__(self, stages: Mapping[int, RemoteStage], means: Means | None = None) -> None:
        super().__init__(stages, _TAKES, means)

    def take(self, stage: RemoteStage, header: Header, payload: memoryview) -> None:
        stage.take(header, self.tensor(header) if header.opcode is Opcode.HIDDEN else payload)

    def lost(self, error: NetworkError) -> None:
        """See `LinkHandler`."""
        self.end(error)
        for stage in list(self.stages.values()):
            stage.lose(error)
