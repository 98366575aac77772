"""The sequences that run, as the scheduler lists them and as whoever looks after their blocks sees them."""

from __future__ import annotations

from collections.abc import Mapping

from core.batching.sequence import Sequence
from core.batching.step import PrefillMeter
from core.execution.records import StepRecord

FIRST_STEPS = 16
"""A sequence that has just begun is expected to go on for as many steps."""


class RunningSequences(list[Sequence]):
    """Changed by the scheduler alone. `meter` measures what a token of a prompt takes."""

    def __init__(self) -> None:
        super().__init__()
        self.meter = PrefillMeter()

    @property
    def prefill_token_s(self) -> float | None:
        """Seconds that a token of a prompt takes lately; None until one has been measured."""
        return self.meter.token_s

    def cold_order(self) -> list[int]:
        """Those that are served last first."""
        return [s.seq_id for s in sorted(self, key=lambda s: s.sort_key, reverse=True)]

    def steps_left(self, seq_id: int) -> int:
        """A sequence is expected to go on for as long as it has gone on already."""
        sequence = next((s for s in self if s.seq_id == seq_id), None)
        if sequence is None:
            return 0
        produced = len(sequence.output_token_ids)
        return max(0, min(sequence.request.max_tokens - produced, max(FIRST_STEPS, produced)))

    def credit(self, record: StepRecord, stage_s: Mapping[str, float]) -> None:
        """A step has taken each stage so long: noted, once each, with the requests that were part of it and are
        traced. Before its tokens are appended."""
        members = set(record.seq_ids.tolist())
        traced = {id(s.request): s.request for s in self if s.request.traced is not None and s.seq_id in members}
        for request in traced.values():
            assert request.traced is not None
            request.traced.add("decode" if request.answering else "prefill", stage_s)
