"""What a step needs beside weights and KV is counted, and no real step needs more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from steering import LONGEST_WAIT_S
from tiny_models import TINY, VOCAB, build_tiny

from core.execution.stage import Stage
from core.execution.step_buffers import InputBatch
from core.inference_pipeline import InferencePipeline
from core.models.architecture import read_architecture
from core.models.stage_model import measure_bytes
from core.profiling.workspace import LiveBytes, measure_workspace
from core.request import SamplingParams

OpenPipeline = Callable[..., InferencePipeline]


def test_tensors_count_for_as_long_as_they_live() -> None:
    known = torch.zeros(1000)
    with LiveBytes((known,)) as live:
        first = known + 1
        view = first[10:20].view(2, 5)
        known[:10].mul_(2)
        assert live.peak == 4000, "what shares memory counts once, and what was there before not at all"
        del first
        second = known + 2
        assert live.peak == 8000, "the view keeps the first one's memory"
        del view, second
        third = torch.cat([known, known])
        assert live.peak == 8000
        del third
        fourth = torch.cat([known, known, known])
    assert live.peak == fourth.nbytes == 12000


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_architecture_can_be_measured(tmp_path: Path, name: str) -> None:
    build_tiny(name, tmp_path)
    architecture = read_architecture(tmp_path)
    experts = measure_bytes(architecture).experts
    small, large = (measure_workspace(architecture, tokens, 8, experts) for tokens in (100, 300))
    assert small is not None
    assert large is not None
    assert small.layers_bytes >= 100 * 3 * 4 * architecture.hidden_size, "residual, input and output at the least"
    assert large.layers_bytes == pytest.approx(3 * small.layers_bytes, rel=0.1)
    assert large.head_bytes >= 8 * VOCAB * 4
    more_rows = measure_workspace(architecture, 300, 16, experts)
    assert more_rows is not None
    assert more_rows.head_bytes == pytest.approx(2 * large.head_bytes, rel=0.5)


@pytest.mark.parametrize("name", ["llama", "gemma", "mixtral", "gpt_oss", "deepseek_v3", "gpt2", "glm4"])
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "plain torch"])
def test_no_step_takes_more_than_was_set_aside(
    tmp_path: Path, open_pipeline: OpenPipeline, monkeypatch: pytest.MonkeyPatch, name: str, kernels: bool
) -> None:
    build_tiny(name, tmp_path)
    pipeline = open_pipeline(
        tmp_path, devices__devices="cpu=64MiB,cpu=64MiB", engine__max_num_batched_tokens=128, engine__cohorts=1,
        engine__kv_cache_tokens=4096, engine__native_kernels=kernels,
    )  # fmt: skip
    peaks: dict[int, int] = {}
    largest = 0
    forward = Stage.forward

    def counted(stage: Stage, batch: InputBatch, hidden: torch.Tensor | None, wants_hidden: bool) -> torch.Tensor:
        nonlocal largest
        assert stage.kv is not None
        pages = [page for layer in range(stage.part.first, stage.part.last) for page in stage.kv.layer(layer)]
        known = (*stage._model.parameters(), *stage._model.buffers(), *pages)
        with LiveBytes(known) as live:
            result = forward(stage, batch, hidden, wants_hidden)
        received = 0 if hidden is None else hidden.nbytes
        peaks[stage.part.first] = max(peaks.get(stage.part.first, 0), live.peak + received)
        largest = max(largest, batch.num_tokens)
        return result

    monkeypatch.setattr(Stage, "forward", counted)
    params = SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False, temperature=0.5, top_p=0.9)
    prompts = [[3 + (7 * i + j) % (VOCAB - 3) for j in range(70)] for i in range(32)]
    for handle in [pipeline.submit(prompt, replace(params, seed=i)) for i, prompt in enumerate(prompts)]:
        handle.result(LONGEST_WAIT_S)
    assert largest == 128
    for stage in pipeline.engine.plan.placement.stages:
        assert 0 < peaks[stage.first_layer] <= stage.workspace_bytes
