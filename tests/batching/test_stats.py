"""The rate that monitoring shows, and that says how long clients of a full queue are to wait."""

from __future__ import annotations

import pytest

from core.batching.scheduler import Scheduler, SchedulerLimits
from core.batching.stats import RATE_WINDOW_S, StatsKeeper
from core.execution.records import SampledToken, SchedulerOutput, StepOutput, StepRecord
from core.kv_cache.manager import KVCacheManager


def test_the_rate_is_that_of_the_last_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    monkeypatch.setattr("core.batching.stats.time.monotonic", lambda: now_s[0])
    keeper = StatsKeeper(Scheduler(KVCacheManager(8, 4), SchedulerLimits(8, 64, 64, 256)))
    assert keeper.current.retry_after_s == 1.0, "nothing is known yet"

    def step(number: int, tokens: int) -> float:
        sampled = {seq_id: SampledToken(5) for seq_id in range(tokens)}
        keeper.step_done(SchedulerOutput(StepRecord(number)), StepOutput(number, sampled=sampled), None)
        now_s[0] += 0.5
        return keeper.current.tokens_per_s

    for number in range(40):
        busy = step(number, 16)
    assert busy == pytest.approx(16 * 11 / RATE_WINDOW_S)
    assert keeper.current.total_tokens == 40 * 16
    for number in range(40, 80):
        slow = step(number, 1)
    assert slow == pytest.approx(11 / RATE_WINDOW_S), "what came before is forgotten"
    assert keeper.current.retry_after_s == pytest.approx(64 / slow)
