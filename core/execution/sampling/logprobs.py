"""Log-probabilities under the model's own distribution: no bias, penalty, temperature or filter.

Values are held at or above `LOGPROB_FLOOR`, as in OpenAI's API, because JSON has no infinity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from core.errors import StepFailedError
from core.execution.sampling import draws
from core.execution.sampling.draws import to_host
from core.request import MAX_LOGPROBS, TokenLogprob

LOGPROB_FLOOR = -9999.0
CHUNK_ELEMENTS = 2**20
"""Logits that are processed at a time on the CPU (4 MiB as float32): what fits in its caches."""
CHUNK_ELEMENTS_ACCELERATOR = 2**26


def rows_per_chunk(vocab_size: int, device: torch.device) -> int:
    elements = CHUNK_ELEMENTS if device.type == "cpu" else CHUNK_ELEMENTS_ACCELERATOR
    return max(1, elements // vocab_size)


@dataclass(frozen=True, slots=True)
class Reported:
    """Log-probabilities of some rows, on the device: of the rows' tokens `[R]`, and the alternatives' `[R, W]` with
    their token ids, best first."""

    chosen: torch.Tensor
    top_values: torch.Tensor
    top_ids: torch.Tensor

    @classmethod
    def of(cls, logprobs: torch.Tensor, token_ids: torch.Tensor, most: int) -> Reported:
        """Of `logprobs` `[R, V]`, for `token_ids` `[R]` with up to `most` alternatives. As many as `MAX_LOGPROBS` are
        always looked for, so that a choice among equals is the same in every batch."""
        chosen = logprobs.gather(1, token_ids[:, None]).squeeze(1).clamp(min=LOGPROB_FLOOR)
        if most == 0:
            none = chosen.new_zeros((len(chosen), 0))
            return cls(chosen, none, none.to(torch.int64))
        values, columns = draws.largest(logprobs, min(max(MAX_LOGPROBS, most), logprobs.shape[1]))
        return cls(chosen, values.clamp(min=LOGPROB_FLOOR)[:, :most], columns[:, :most])


def token_logprobs(
    tokens: Sequence[int], chosen: torch.Tensor, top_values: torch.Tensor, top_ids: torch.Tensor, tops: Sequence[int]
) -> list[TokenLogprob]:
    """One record per row of what is `Reported`, by now on the host, with `tops[r]` alternatives."""
    rows = zip(tokens, chosen.tolist(), top_ids.tolist(), top_values.tolist(), tops, strict=True)
    return [
        TokenLogprob(token, value, tuple(zip(ids[:top], values[:top], strict=True)))
        for token, value, ids, values, top in rows
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
        found = Reported.of(logprobs, tokens, top)
        ids, chosen, values, columns = to_host(tokens, found.chosen, found.top_values, found.top_ids)
        result += token_logprobs(ids.tolist(), chosen, values, columns, [top] * len(tokens))
    return result
