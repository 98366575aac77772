"""What `generate()` makes of prompts that are longer than one device of a test holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tiny_models import VOCAB, build_tiny


def prompts(lengths: Sequence[int]) -> list[list[int]]:
    """One of each length, the same in every test."""
    return [
        torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        for length in lengths
    ]


def tiny_with_answers(path: Path, lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Writes a model to `path`; its greedy answers to those prompts."""
    model = build_tiny("qwen3", path)
    found = []
    for prompt in prompts(lengths):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False)
        found.append(out[0, len(prompt) :].tolist())
    return found
