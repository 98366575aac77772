"""What the engine shows of itself."""

from __future__ import annotations

from dataclasses import dataclass


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
