"""Raw tensor inference: token ids in, logits or hidden states out, without a place in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from core.errors import PageMoveError, QueueFullError
from core.execution.schedule import ScheduledSequence, SchedulerOutput
from core.request import SamplingParams

if TYPE_CHECKING:
    from core.engine.model_engine import ModelEngine

_RAW_SEQ_ID = -1


def run_raw(engine: ModelEngine, tokens: Sequence[int], output: str, positions: str) -> torch.Tensor:
    """Called on the engine thread between two steps. Blocks are borrowed for the time of the call.

    Returns fp32 on the CPU: `[P, vocab]` or `[P, hidden_size]`, P being 1 or the number of tokens.
    """
    kv, batcher = engine.kv, engine.batcher
    chunk = batcher.scheduler.limits.max_num_batched_tokens
    kv.open(_RAW_SEQ_ID, tokens, read_prefix=False)
    try:
        parts = []
        for start in range(0, len(tokens), chunk):
            part = tokens[start : start + chunk]
            end = start + len(part)
            if not kv.ensure_free(kv.blocks_needed(_RAW_SEQ_ID, start, len(tokens))) or not kv.grow(
                _RAW_SEQ_ID, start, end
            ):
                raise QueueFullError("The KV cache has no free blocks for this call; try again later.")
            if not batcher.move_pages():  # on its own, so that a move that fails is nobody's forward pass
                raise PageMoveError("KV pages could not be moved.")
            table = kv.table(_RAW_SEQ_ID).snapshot()
            item = ScheduledSequence(_RAW_SEQ_ID, start, part, table, SamplingParams(), 0, sample=False)
            rows = list(range(len(part))) if positions == "all" else [len(part) - 1]
            wanted = positions == "all" or end == len(tokens)
            step = batcher.scheduler.raw_step(item)
            try:
                result = _forward(engine, step, output, rows if wanted else None)
            finally:
                kv.step_done(step.step)
            kv.table(_RAW_SEQ_ID).num_full = end // kv.block_size
            if wanted:
                parts.append(result.float().cpu())
        return torch.cat(parts)
    finally:
        kv.close(_RAW_SEQ_ID)


def _forward(engine: ModelEngine, step: SchedulerOutput, output: str, rows: list[int] | None) -> torch.Tensor:
    if output == "logits" and rows is not None:
        return engine.runner.logits(step, rows)
    hidden = engine.runner.hidden_states(step)
    return hidden if rows is None else hidden[rows]
