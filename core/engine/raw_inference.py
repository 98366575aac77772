"""Raw tensor inference: token ids in, logits or hidden states out, without a place in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch

from core.batching.sequence import Request
from core.batching.sequence import Sequence as TokenSequence
from core.errors import PageMoveError, QueueFullError
from core.execution.records import RawRows, ints
from core.request import SamplingParams

if TYPE_CHECKING:
    from core.engine.model_engine import ModelEngine

_RAW_SEQ_ID = -1


def run_raw(
    engine: ModelEngine, tokens: Sequence[int], output: Literal["logits", "hidden_states"], positions: str
) -> torch.Tensor:
    """Called on the engine thread between two steps. Blocks are borrowed for the time of the call.

    Returns fp32 on the CPU: `[P, vocab]` or `[P, hidden_size]`, P being 1 or the number of tokens.
    """
    kv, batcher = engine.kv, engine.batcher
    chunk = batcher.scheduler.limits.max_num_batched_tokens
    request = Request("raw", list(tokens), SamplingParams(), 0)
    sequence = TokenSequence(request, 0, 0, request.prompt_token_ids, seq_id=_RAW_SEQ_ID)
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
            rows = range(len(part)) if positions == "all" else [len(part) - 1]
            wanted = positions == "all" or end == len(tokens)
            step = batcher.scheduler.raw_step(sequence, start, end, RawRows(output, ints(rows)) if wanted else None)
            try:
                result = engine.runner.execute(step)
            finally:
                kv.step_done(step.step)
            kv.table(_RAW_SEQ_ID).num_full = end // kv.block_size
            if result.raw is not None:
                parts.append(torch.from_numpy(result.raw))
        return torch.cat(parts)
    finally:
        kv.close(_RAW_SEQ_ID)
