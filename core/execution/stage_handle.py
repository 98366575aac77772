"""All that the runner knows of a stage. The stage in this process (`core.execution.stage`) is one kind.

::

    begin(record, part)                 told of a step; steps are told in order, in the engine's thread
    inlet.put(step, hidden)             what the stage before computed has arrived
    run(step)                           compute it: steps run in the order in which they were told
    hand_on(step, inlet)                send what was computed to the following stage's inlet
    results(step)                       of the last stage: sampled tokens, or what else was wanted
    skip(step)                          instead of `run`: the step has failed before; pages are moved all the same
    seconds(step)                       how long it computed, once the step's results are there

A stage says where hidden states arrive and where they leave it, not what it is made of: it may be several devices that
share its layers, or on another machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from core.devices import Device
from core.execution.records import StageReport, StepOutput, StepRecord
from core.kv_cache.page_ops import StagePart


class Inlet(Protocol):
    """Where a stage takes hidden states."""

    @property
    def device(self) -> Device:
        """Where they have to arrive."""

    def put(self, step: int, hidden: torch.Tensor) -> None:
        """Hidden states of a step, `[1, T, hidden_size]` on `device`, which are the stage's from now on."""


class StageHandle(Protocol):
    """See the module."""

    @property
    def devices(self) -> Sequence[Device]:
        """What it computes on."""

    @property
    def inlet(self) -> Inlet: ...

    @property
    def outlet(self) -> Device:
        """Where hidden states are when `run` has ended."""

    def overlap(self, several: bool) -> None:
        """Whether other stages compute at the same time from now on. Called between steps."""

    def begin(self, record: StepRecord, part: StagePart) -> None:
        """Raises `RecordError` for a record that does not follow on those before."""

    def run(self, step: int) -> None:
        """Raises whatever the forward pass raises; `DeviceLostError` if the stage does not answer any more."""

    def hand_on(self, step: int, inlet: Inlet) -> None: ...

    def results(self, step: int) -> StepOutput: ...

    def skip(self, step: int) -> None:
        """Raises `PageMoveError` if pages could not be moved."""

    def seconds(self, step: int) -> float:
        """0 where that is not known, or was asked before."""

    def report(self) -> StageReport: ...

    def free(self) -> None:
        """Give weights and pages back. Nothing is in flight any more."""
