"""What the engine notes of a request whose trace is recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from core.request import Phase, StageWork, TraceContext


@dataclass(eq=False, slots=True)
class Traced:
    """Goes with the request, whichever engine it is in. Engine thread."""

    context: TraceContext
    _work: dict[tuple[Phase, str], tuple[int, float]] = field(default_factory=dict)

    def add(self, phase: Phase, stage_s: Mapping[str, float]) -> None:
        """The request was part of a step that took each stage so many seconds."""
        for stage, seconds in stage_s.items():
            steps, busy_s = self._work.get((phase, stage), (0, 0.0))
            self._work[phase, stage] = steps + 1, busy_s + seconds

    def work(self) -> tuple[StageWork, ...]:
        """What has been added."""
        return tuple(StageWork(*key, *done) for key, done in self._work.items())
