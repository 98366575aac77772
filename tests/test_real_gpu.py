"""The whole way on a real GPU: `pytest tests/test_real_gpu.py -m gpu`. What parts do there is tested beside them.

Skipped where torch has no CUDA or ROCm device that it has kernels for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from steering import LONGEST_WAIT_S
from tiny_models import build_tiny

from core.inference_pipeline import InferencePipeline
from core.request import SamplingParams

OpenPipeline = Callable[..., InferencePipeline]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, detokenize=False)
PROMPTS = [[5, 6, 7, 8], list(range(3, 90)), [9] * 40]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU"),
]


def tokens(pipeline: InferencePipeline) -> list[list[int]]:
    handles = [pipeline.submit(prompt, GREEDY) for prompt in PROMPTS]
    return [handle.result(LONGEST_WAIT_S).completions[0].token_ids for handle in handles]


@pytest.fixture
def wanted(tmp_path: Path, open_pipeline: OpenPipeline) -> list[list[int]]:
    """What the processor gives, in fp32."""
    build_tiny("llama", tmp_path)
    pipeline = open_pipeline(tmp_path, devices__devices="cpu=256MiB")
    given = tokens(pipeline)
    pipeline.shutdown()
    return given


@pytest.mark.parametrize(
    ("devices", "layers"),
    [("cuda:0=2GiB", "4"), ("cuda:0=1GiB,cuda:0=1GiB", "2,2"), ("cuda:0=1GiB,cpu=256MiB", "3,1")],
    ids=["a card", "two parts of a card", "a card and the processor"],
)
def test_a_card_gives_the_processors_tokens(
    tmp_path: Path, open_pipeline: OpenPipeline, wanted: list[list[int]], devices: str, layers: str
) -> None:
    pipeline = open_pipeline(tmp_path, devices__devices=devices, devices__layers=layers)
    assert tokens(pipeline) == wanted
    assert tokens(pipeline) == wanted, "from cached prefixes too"


def test_a_card_is_given_back(tmp_path: Path, open_pipeline: OpenPipeline, wanted: list[list[int]]) -> None:
    """After each of several loads as much memory is in use as after the first, and none once the model is unloaded."""
    pipeline = open_pipeline(tmp_path, devices__devices="cuda:0=2GiB")
    held = []
    for _ in range(3):
        assert tokens(pipeline) == wanted
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
        pipeline.load()
    assert held[1] == held[2]
    pipeline.unload()
    assert torch.cuda.memory_allocated() == 0


def test_a_running_model_moves_between_card_and_processor(
    tmp_path: Path, open_pipeline: OpenPipeline, wanted: list[list[int]]
) -> None:
    pipeline = open_pipeline(tmp_path, devices__devices="cuda:0=1GiB", devices__layers="4")
    handles = [pipeline.submit(prompt, GREEDY) for prompt in PROMPTS]
    pipeline.place(devices="cuda:0=1GiB,cpu=256MiB", layers="2,2")
    assert [handle.result(LONGEST_WAIT_S).completions[0].token_ids for handle in handles] == wanted
