"""From vectors of tokens to one vector for each text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from core.embedding.layout import Layout, Pooling


def pool(hidden: torch.Tensor, lengths: Sequence[int], skips: Sequence[int], layout: Layout) -> torch.Tensor:
    """Vectors of texts from those of their tokens.

    Args:
        hidden: `[B, T, H]`; what is behind a text's tokens is padding.
        lengths: tokens of each text, 1 to T.
        skips: tokens at the beginning of each that are a prompt's; they count where the layout says so.

    Returns:
        fp32 `[B, len(poolings) * H]`. Means and maxima are as in sentence-transformers' `Pooling`.
    """
    size = torch.tensor(lengths, device=hidden.device)
    first = torch.tensor([0 if layout.include_prompt else skip for skip in skips], device=hidden.device)
    places = torch.arange(hidden.shape[1], device=hidden.device)
    counted = (places < size[:, None]) & (places >= first[:, None])
    numbers = hidden.float()
    vectors = torch.cat([_pooled(numbers, counted, size, mode) for mode in layout.poolings], dim=1)
    return torch.nn.functional.normalize(vectors, dim=1) if layout.normalize else vectors


def _pooled(hidden: torch.Tensor, counted: torch.Tensor, size: torch.Tensor, mode: Pooling) -> torch.Tensor:
    rows = torch.arange(len(hidden), device=hidden.device)
    if mode == "lasttoken":
        return hidden[rows, size - 1]
    if mode == "cls":
        return hidden[rows, counted.int().argmax(dim=1)]
    if mode == "max":
        return hidden.masked_fill(~counted[:, :, None], -torch.inf).amax(dim=1)
    weights = counted.float()
    if mode == "weightedmean":
        weights = weights * torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
    total = torch.einsum("bth,bt->bh", hidden, weights)
    share = weights.sum(dim=1, keepdim=True).clamp(min=1e-9)
    return total / (share.sqrt() if mode == "mean_sqrt_len_tokens" else share)
