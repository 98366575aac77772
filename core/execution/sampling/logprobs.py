"""Log-probabilities under the model's own distribution: no bias, penalty, temperature or filter.

Values are held at or above `LOGPROB_FLOOR`, as in OpenAI's API, because JSON has no infinity.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from core.errors import StepFailedError
from core.execution.sampling import row_ops
from core.request import MAX_LOGPROBS, TokenLogprob

LOGPROB_FLOOR = -9999.0
CHUNK_ELEMENTS = 2**20
"""Logits that are processed at a time on the CPU (4 MiB as float32): what fits in its caches."""
CHUNK_ELEMENTS_ACCELERATOR = 2**26


def rows_per_chunk(vocab_size: int, device: torch.device) -> int:
    elements = CHUNK_ELEMENTS if device.type == "cpu" else CHUNK_ELEMENTS_ACCELERATOR
    return max(1, elements // vocab_size)


def token_logprobs(logprobs: torch.Tensor, token_ids: torch.Tensor, tops: Sequence[int]) -> list[TokenLogprob]:
    """One record per row of `logprobs` `[R, V]`, for `token_ids` `[R]` with `tops[r]` alternatives.

    As many as `MAX_LOGPROBS` are always looked for, so that a choice among equals is the same in every batch.
    """
    chosen = logprobs.gather(1, token_ids[:, None]).squeeze(1).clamp(min=LOGPROB_FLOOR).tolist()
    tokens = token_ids.tolist()
    most = max(tops, default=0)
    if most == 0:
        return [TokenLogprob(token, value) for token, value in zip(tokens, chosen, strict=True)]
    width = min(max(MAX_LOGPROBS, most), logprobs.shape[1])
    values, columns = row_ops.largest(logprobs, width)
    top_values, top_ids = values.clamp(min=LOGPROB_FLOOR)[:, :most].tolist(), columns[:, :most].tolist()
    return [
        TokenLogprob(token, value, tuple(zip(ids[:top], row[:top], strict=True)))
        for token, value, ids, row, top in zip(tokens, chosen, top_ids, top_values, tops, strict=True)
    ]


def prompt_logprobs(
    logits: torch.Tensor, next_token_ids: torch.Tensor, top: int, vocab_size: int | None = None
) -> list[TokenLogprob]:
    """Log-probabilities of prompt tokens: of `next_token_ids[t]` under `logits[t]`.

    `logits` `[T, V]` of any float type, `next_token_ids` int64 `[T]`, `top` alternatives each. Columns from
    `vocab_size` up are padding and left out. Memory is bounded by working on a few rows at a time.
    Raises `StepFailedError` where the logits are not numbers.
    """
    logits = logits[:, :vocab_size]
    step = rows_per_chunk(max(1, logits.shape[1]), logits.device)
    next_token_ids = next_token_ids.to(logits.device)
    result: list[TokenLogprob] = []
    for start in range(0, logits.shape[0], step):
        rows = slice(start, start + step)
        logprobs = torch.log_softmax(logits[rows].to(torch.float32), dim=1)
        tokens = next_token_ids[rows]
        if bool(logprobs.gather(1, tokens[:, None]).isnan().any()):
            raise StepFailedError("The model produced logits that are not numbers for the prompt (NaN or infinity).")
        result += token_logprobs(logprobs, tokens, [top] * len(tokens))
    return result
