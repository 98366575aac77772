"""Apple's GPUs have no float64: sampling must not ask one for it. A tensor that says it is on such a device, but
computes on the CPU and refuses float64, stands for one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

from core.execution.sampler import Sampler, SamplingRow, prompt_logprobs
from core.request import SamplingParams

MPS = torch.device("mps")
VOCAB = 700


class OnMps(torch.Tensor):
    """Torch takes it for a tensor on the CPU, since this build may know no other; those who ask hear "mps"."""

    device = MPS

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> OnMps:
        if data.dtype is torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype, strides=data.stride())

    def __init__(self, data: torch.Tensor) -> None:
        self.data_on_cpu = data

    def cpu(self) -> torch.Tensor:
        return self.data_on_cpu

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if args == (MPS,) else super().to(*args, **kwargs)

    def tolist(self) -> list[Any]:
        return self.data_on_cpu.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(cls._inner, (args, kwargs or {}))
        return tree_map(lambda item: cls(item) if isinstance(item, torch.Tensor) else item, func(*args, **kwargs))

    @staticmethod
    def _inner(item: Any) -> Any:
        return item.data_on_cpu if isinstance(item, OnMps) else item


ROWS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8),
    SamplingParams(temperature=1.0, top_p=0.9, top_k=40, min_p=0.01),
    SamplingParams(temperature=0.7, frequency_penalty=0.3, repetition_penalty=1.2, logit_bias={3: 2.0}, logprobs=4),
    SamplingParams(temperature=0.0, logprobs=0),
]


def rows_of(params: list[SamplingParams]) -> list[SamplingRow]:
    return [SamplingRow(index, each, 7 + index, 20, (1, 2, 3), (4, 5)) for index, each in enumerate(params)]


def test_the_stand_in_refuses_float64() -> None:
    with pytest.raises(TypeError, match="float64"):
        OnMps(torch.zeros(2)).to(torch.float64)


@pytest.mark.parametrize("params", [ROWS, ROWS[:1], *([row] for row in ROWS[1:])], ids=len)
def test_what_is_sampled_is_what_a_cpu_samples(params: list[SamplingParams]) -> None:
    logits = torch.randn(len(params), VOCAB, generator=torch.Generator().manual_seed(1)) * 3
    expected = Sampler(VOCAB, torch.device("cpu")).sample(logits, rows_of(params))
    assert Sampler(VOCAB, MPS).sample(OnMps(logits), rows_of(params)) == expected


def test_logprobs_of_a_prompt() -> None:
    logits, tokens = torch.randn(5, VOCAB), torch.arange(5)
    assert prompt_logprobs(OnMps(logits), OnMps(tokens), 3) == prompt_logprobs(logits, tokens, 3)
