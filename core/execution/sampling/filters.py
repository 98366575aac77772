"""min_p, top_k and top_p, and a draw from what they leave.

Tokens are put in one order, most likely first and equals by id, so that each filter keeps a prefix of it:

* min_p keeps tokens at least `min_p` times as likely as the most likely one;
* top_k keeps tokens at least as likely as the k-th (all that equal it, as in Hugging Face's warper);
* top_p keeps the smallest prefix whose share of what is left reaches `top_p`.

Sorting a vocabulary is slow, so a row is first tried with its few largest logits. They settle it if the prefix ends
strictly above the last of them; otherwise the next tier has a go, and at last the whole row is sorted. A row's tier
depends on that row alone, and each tier gives the same prefix, cumulative sums and token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from core.execution.sampling import row_ops
from core.request import SamplingParams

CANDIDATE_TIERS = (64, 8192)


def is_filtered(params: SamplingParams, vocab_size: int) -> bool:
    return params.top_p < 1.0 or params.min_p > 0.0 or 0 < params.top_k < vocab_size


@dataclass(frozen=True, slots=True)
class Filters:
    """Thresholds per row `[R]`. `top_k` is the vocabulary's size where off."""

    top_k: npt.NDArray[np.int64]
    top_p: npt.NDArray[np.float64]
    min_p: npt.NDArray[np.float64]

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocab_size: int) -> Filters:
        top_k = [item.top_k if 0 < item.top_k < vocab_size else vocab_size for item in params]
        return cls(
            np.array(top_k, dtype=np.int64),
            np.array([item.top_p for item in params], dtype=np.float64),
            np.array([item.min_p for item in params], dtype=np.float64),
        )


def draw_filtered(
    logits: torch.Tensor,
    probs: torch.Tensor,
    totals: torch.Tensor,
    uniform: torch.Tensor,
    filters: Filters,
    tiers: Sequence[int] = CANDIDATE_TIERS,
) -> torch.Tensor:
    """Draw one token per row, int64 `[R]`.

    `logits` `[R, V]` are scaled by temperature; `probs` float32 `[R, V]` are their softmax and `totals` float64 `[R]`
    the sums of `probs`; `uniform` float64 `[R]` lies in [0, 1). Rows with NaN yield some token without an error.
    """
    num_rows, vocab_size = logits.shape
    tokens = torch.zeros(num_rows, dtype=torch.int64, device=logits.device)
    pending = np.arange(num_rows)
    for size in (*(size for size in tiers if size < vocab_size), vocab_size):
        whole = size == vocab_size
        fits = filters.top_k[pending]
        tried = pending[(fits < size) | (fits == vocab_size)]
        if not len(tried):
            continue
        index = torch.from_numpy(tried).to(logits.device)
        mine = slice(None) if len(tried) == num_rows else index
        top, columns = row_ops.largest(logits[mine], size)
        tier = _Tier(top, probs[mine].gather(1, columns).to(torch.float64), totals[mine], whole)
        column, settled = tier.draw(uniform[mine], filters, tried)
        tokens[index] = columns.gather(1, column).squeeze(1)
        if whole:
            break
        pending = np.setdiff1d(pending, tried[settled.cpu().numpy()], assume_unique=True)
        if not len(pending):
            break
    return tokens


@dataclass(frozen=True, slots=True)
class _Tier:
    """The largest logits `top` `[R, N]` of some rows, in order, with their probabilities (float64)."""

    top: torch.Tensor
    probs: torch.Tensor
    totals: torch.Tensor
    whole: bool

    def draw(
        self, uniform: torch.Tensor, filters: Filters, rows: npt.NDArray[np.int64]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns drawn, `[R, 1]`, and whether the tier settles each row, bool `[R]`."""
        device, size = self.top.device, self.top.shape[1]
        top_k = torch.from_numpy(filters.top_k[rows]).to(device)[:, None]
        top_p = torch.from_numpy(filters.top_p[rows]).to(device)[:, None]
        min_p = torch.from_numpy(filters.min_p[rows]).to(device)[:, None]
        limited = torch.from_numpy((filters.top_k[rows] <= size) | (filters.min_p[rows] > 0.0)).to(device)[:, None]

        kept = self.top >= self.top.gather(1, top_k.clamp(max=size) - 1)
        kept &= self.probs >= min_p * self.probs[:, :1]
        cumulative = self.probs.cumsum(dim=1)
        last = _last(kept)
        settled = ~limited | self._ends_inside(last)
        mass = torch.where(limited, cumulative.gather(1, last), self.totals[:, None])

        before = torch.cat((torch.zeros_like(mass), cumulative[:, :-1]), dim=1)
        kept &= before < top_p * mass
        last = _last(kept)
        settled &= self._ends_inside(last)
        target = row_ops.below(cumulative.gather(1, last).squeeze(1), uniform)
        return torch.minimum(row_ops.pick(cumulative, target), last), settled.squeeze(1)

    def _ends_inside(self, last: torch.Tensor) -> torch.Tensor:
        """Whether no token outside the tier could equal the one at `last` `[R, 1]`."""
        if self.whole:
            return torch.ones_like(last, dtype=torch.bool)
        return self.top.gather(1, last) > self.top[:, -1:]


def _last(kept: torch.Tensor) -> torch.Tensor:
    """Index `[R, 1]` of the last element of a prefix that is given as a mask `[R, N]`."""
    return kept.sum(dim=1, keepdim=True).clamp_(min=1) - 1
