"""Executes a `SchedulerOutput`: stages are told, compute one after the other, and the last one's results come back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from core.devices.exhaustion import is_out_of_memory
from core.errors import DeviceLostError, OutOfDeviceMemoryError
from core.execution.pipeline import Station, StationLine
from core.execution.records import SchedulerOutput, StepDone, StepOutput
from core.execution.stage_handle import StageHandle
from core.execution.threads import CpuThreads
from core.transfer import TransferManager


@dataclass(slots=True)
class _Flight:
    """A step on its way through the stages."""

    step: int
    result: StepOutput | None = None


class _FaultsOf:
    """What a stage's device has to answer for, by name: memory that ran out, and a device that is gone."""

    __slots__ = ("_stage",)

    def __init__(self, stage: StageHandle) -> None:
        self._stage = stage

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            return
        if is_out_of_memory(error):
            names = ", ".join(device.name for device in self._stage.devices)
            raise OutOfDeviceMemoryError(f"{names} ran out of memory in a step: {error}") from error
        if isinstance(error, torch.AcceleratorError):
            raise DeviceLostError(f"A device has failed: {error}", device=self._stage.devices[0].name) from error


class ModelRunner:
    """Drives the stages of one loaded model.

    The engine thread runs a step by itself with `execute`, or puts several in flight with `submit`; then every stage
    has a thread of its own. `cpu_threads` is told which of the two it is. `timed`: results say what stages took.
    """

    def __init__(
        self, stages: Sequence[StageHandle], transfer: TransferManager, cpu_threads: CpuThreads | None = None,
        torch_threads: int | None = None, timed: bool = False,
    ) -> None:  # fmt: skip
        self.stages = tuple(stages)
        self._names = tuple(f"{index}:{_devices_of(stage)}" for index, stage in enumerate(stages)) if timed else ()
        self._transfer = transfer
        self._cpu_threads = cpu_threads
        self._torch_threads = torch_threads
        self._line: StationLine[_Flight] | None = None
        self._several: bool | None = None

    def execute(self, output: SchedulerOutput) -> StepOutput:
        """One step, here. Raises whatever the forward pass raises; the KV of the step's tokens is then undefined.

        A step without sequences moves pages and computes nothing. If a stage fails, those behind it still do what the
        step asks of their pages: other sequences' blocks may have moved.
        """
        self._overlap(False)
        self._begin(output)
        for index, stage in enumerate(self.stages):
            try:
                with _FaultsOf(stage):
                    stage.run(output.step)
                    if index + 1 < len(self.stages):
                        stage.hand_on(output.step, self.stages[index + 1].inlet)
            except BaseException:
                for behind in self.stages[index + 1 :]:
                    behind.skip(output.step)
                raise
        return self._results(output.step)

    def _results(self, step: int) -> StepOutput:
        with _FaultsOf(self.stages[-1]):
            result = self.stages[-1].results(step)
        if self._names:
            result.stage_s = {name: stage.seconds(step) for name, stage in zip(self._names, self.stages, strict=True)}
        return result

    def submit(self, output: SchedulerOutput, done: StepDone) -> None:
        """One step, in the stages' own threads. `done(output, result or error)` is called from the last of them, or
        from this one if a stage cannot be told of the step."""
        self._overlap(True)
        if self._line is None:
            self._line = StationLine(self._stations())

        def finish(flight: _Flight, error: Exception | None) -> None:
            result = error or flight.result
            assert result is not None
            done(output, result)

        try:
            self._begin(output)
        except Exception as error:  # noqa: BLE001  as if the step had failed later: whoever waits hears of it in one way
            done(output, error)
            return
        self._line.submit(_Flight(output.step), finish)

    def close(self) -> None:
        """End the stages' threads."""
        if self._line is not None:
            self._line.close()
            self._line = None

    def _overlap(self, several: bool) -> None:
        if several is self._several:
            return
        self._several = several
        if self._cpu_threads is not None:
            self._cpu_threads.overlap(several)
        for stage in self.stages:
            stage.overlap(several)

    def _begin(self, output: SchedulerOutput) -> None:
        for index, stage in enumerate(self.stages):
            stage.begin(output.record, output.part(index))

    def _stations(self) -> list[Station[_Flight]]:
        stations: list[Station[_Flight]] = []
        for index, stage in enumerate(self.stages):
            has_link = index > 0 and self._transfer.is_slow(self.stages[index - 1].outlet, stage.inlet.device)
            if has_link:
                stations.append(Station(f"link-{index}", partial(self._receive, index)))
            run = self._run if has_link or index == 0 else self._receive_and_run
            stations.append(
                Station(f"stage-{index}", partial(run, index), self._prepare_thread, partial(self._skip, index))
            )
        stations.append(Station("results", self._finish, self._prepare_thread))
        return stations

    def _prepare_thread(self) -> None:
        if self._torch_threads is not None:
            torch.set_num_threads(self._torch_threads)

    def _receive(self, index: int, flight: _Flight) -> None:
        with _FaultsOf(self.stages[index]):
            self.stages[index - 1].hand_on(flight.step, self.stages[index].inlet)

    def _run(self, index: int, flight: _Flight) -> None:
        with _FaultsOf(self.stages[index]):
            self.stages[index].run(flight.step)

    def _receive_and_run(self, index: int, flight: _Flight) -> None:
        try:
            self._receive(index, flight)
        except BaseException:
            self._skip(index, flight)
            raise
        self._run(index, flight)

    def _skip(self, index: int, flight: _Flight) -> None:
        """What a step that has failed still owes a stage."""
        self.stages[index].skip(flight.step)

    def _finish(self, flight: _Flight) -> None:
        """In flight this has a thread of its own: the last stage goes on with the next step meanwhile."""
        flight.result = self._results(flight.step)


def _devices_of(stage: StageHandle) -> str:
    return "+".join(device.name for device in stage.devices)
