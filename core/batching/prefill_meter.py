"""What a token of a prompt takes, measured on the steps that compute many."""

from __future__ import annotations

import time

from core.execution.records import SchedulerOutput

MEASURED_TOKENS = 16
"""A step with as many tokens says what a token of a prompt costs."""


class PrefillMeter:
    """Steps end in the order in which they begin. What a step waited for those in flight before it is not its time, and
    what it took to move pages besides counts as little as possible."""

    def __init__(self) -> None:
        self.token_s: float | None = None
        self._began_s: dict[int, float] = {}
        self._ended_s = 0.0

    def begun(self, step: int) -> None:
        self._began_s[step] = time.perf_counter()

    def failed(self, step: int) -> None:
        """A step that failed says nothing."""
        self._began_s.pop(step, None)
        self._ended_s = time.perf_counter()

    def ended(self, output: SchedulerOutput) -> float | None:
        """Seconds per token of a prompt, with this step; None until one has been measured."""
        now_s, before_s = time.perf_counter(), self._ended_s
        self._ended_s = now_s
        began_s = self._began_s.pop(output.step, None)
        if began_s is None or output.num_tokens < MEASURED_TOKENS:
            return self.token_s
        token_s, old_s = (now_s - max(began_s, before_s)) / output.num_tokens, self.token_s
        if old_s is not None and any(part.ops for part in output.parts):
            token_s = min(token_s, old_s)
        self.token_s = token_s if old_s is None else old_s + 0.3 * (token_s - old_s)
        return self.token_s
