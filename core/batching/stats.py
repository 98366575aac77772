"""What the engine shows of itself."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, replace

from core.batching.scheduler import Scheduler
from core.execution.records import SchedulerOutput, StepOutput

RATE_WINDOW_S = 5.0


@dataclass(frozen=True, slots=True)
class BatcherStats:
    """Snapshot for monitoring, replaced as a whole after each step. Rates are over the last few seconds."""

    steps: int = 0
    running: int = 0
    waiting: int = 0
    batch_tokens: int = 0
    batch_size: int = 0
    tokens_per_s: float = 0.0
    total_tokens: int = 0
    preemptions: int = 0
    queried_tokens: int = 0
    hit_tokens: int = 0
    blocks_total: int = 0
    blocks_free: int = 0
    blocks_cached: int = 0
    evictions: int = 0
    failed_steps: int = 0
    last_error: str | None = None

    @property
    def retry_after_s(self) -> float:
        """Guess from the measured rate: when a queued request's worth of tokens has been produced."""
        return max(1.0, min(60.0, 64.0 / self.tokens_per_s)) if self.tokens_per_s > 0 else 1.0


class StatsKeeper:
    """Makes the snapshots; used by the engine thread, `current` may be read by any."""

    def __init__(self, scheduler: Scheduler) -> None:
        pool = scheduler.kv.pool
        self.current = BatcherStats(blocks_total=pool.limit, blocks_free=pool.num_free)
        self._scheduler = scheduler
        self._recent: deque[tuple[float, int]] = deque()
        self._recent_tokens = 0

    def step_done(self, output: SchedulerOutput, result: StepOutput | None, last_error: str | None) -> None:
        """After a step; None: it failed."""
        now, produced = time.monotonic(), len(result.sampled) if result is not None else 0
        self._recent.append((now, produced))
        self._recent_tokens += produced
        while self._recent[0][0] < now - RATE_WINDOW_S:
            self._recent_tokens -= self._recent.popleft()[1]
        span = max(now - self._recent[0][0], 1e-3)
        rate = self._recent_tokens / span if len(self._recent) > 1 else 0.0
        scheduler, old = self._scheduler, self.current
        pool = scheduler.kv.pool
        self.current = replace(
            old,
            steps=output.step,
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            batch_tokens=output.num_tokens,
            batch_size=output.record.num_sequences,
            tokens_per_s=rate,
            total_tokens=old.total_tokens + produced,
            preemptions=scheduler.num_preemptions,
            queried_tokens=scheduler.kv.prefix.queried_tokens,
            hit_tokens=scheduler.kv.prefix.hit_tokens,
            blocks_total=pool.limit,
            blocks_free=pool.num_free,
            blocks_cached=pool.num_cached,
            evictions=pool.evictions,
            failed_steps=old.failed_steps + (result is None),
            last_error=last_error,
        )

    def refresh_counts(self) -> None:
        """After an abort between steps, so that an idle engine does not show it as running."""
        scheduler = self._scheduler
        self.current = replace(
            self.current,
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            blocks_free=scheduler.kv.pool.num_free,
        )
