"""Stages that hear of every step, and tell of every result, as they would over a wire."""

from __future__ import annotations

from typing import Any

from steering import LONGEST_WAIT_S

from core.engine.model_engine import ModelEngine
from core.execution.codec import decode, encode
from core.execution.records import StepOutput, StepRecord
from core.kv_cache.page_ops import StagePart


class Wired:
    """A stage's handle whose records are encoded and decoded."""

    def __init__(self, stage: Any) -> None:
        self._stage = stage
        self.records = 0

    def begin(self, record: StepRecord, part: StagePart) -> None:
        self.records += 1
        self._stage.begin(decode(encode(record), StepRecord), decode(encode(part), StagePart))

    def results(self, step: int) -> StepOutput:
        return decode(encode(self._stage.results(step)), StepOutput)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)


def wire(engine: ModelEngine) -> list[Wired]:
    """Put a wire between an engine's runner and its stages."""
    stages = [Wired(stage) for stage in engine.runner.stages]

    def put() -> None:
        engine.runner.close()
        engine.runner.stages = tuple(stages)

    engine.batcher.call(put).result(LONGEST_WAIT_S)
    return stages
