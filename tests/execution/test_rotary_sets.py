"""Rotary embeddings that take one set of frequencies for all tokens, as they were before transformers 5.19."""

from __future__ import annotations

import torch

from core.execution.rotary import _set_by_set


def test_each_token_gets_what_its_own_frequencies_give() -> None:
    positions = torch.tensor([[0, 1, 2, 5, 6]])
    short, long = torch.tensor([1.0, 0.1, 0.01]), torch.tensor([0.5, 0.05, 0.005])
    by_token = torch.stack([short, long, short, long, long])
    asked: list[torch.Tensor] = []

    def forward(frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(frequencies)
        angles = (frequencies[None, :, None] @ positions[:, None, :].float()).transpose(1, 2)
        return angles.cos(), angles.sin()

    cos, sin = _set_by_set(forward, by_token)
    angles = positions[0, :, None] * by_token
    torch.testing.assert_close(cos, angles.cos()[None])
    torch.testing.assert_close(sin, angles.sin()[None])
    assert len(asked) == 2, "once for each set, not for each token"
