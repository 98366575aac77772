"""Every attention backend gives the definition's answer. The Triton kernel runs in Triton's interpreter here."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from execution.paged_cases import CASES, Case, dense, make, tolerance

from core.execution.attention.torch_paged import TorchPagedAttention
from core.execution.attention.triton_probe import open_triton
from core.profiling.workspace import LiveBytes

_INTERPRETED = """
import sys
sys.path.insert(0, {tests!r})
from execution.paged_cases import CASES, dense, make, tolerance
from core.execution.attention.triton_paged import TritonPagedAttention
from core.execution.attention.triton_variants import GpuLimits
import torch
for name, case in CASES.items():
    if case.dtype is torch.bfloat16:
        continue  # numpy, which the interpreter computes with, has none: the test on a GPU covers it
    inputs = make(case)
    got, expected = TritonPagedAttention(GpuLimits("cuda", 86, 99 * 1024)).attend(*inputs).double(), dense(*inputs)
    worst = (got - expected).abs().max().item()
    assert worst < tolerance(case), (name, worst)
    print("checked", name)
"""


@pytest.mark.parametrize("name", sorted(CASES))
def test_torch_backend(name: str) -> None:
    case = CASES[name]
    inputs = make(case)
    got = TorchPagedAttention().attend(*inputs).double()
    torch.testing.assert_close(got, dense(*inputs), atol=tolerance(case), rtol=0)


@pytest.mark.parametrize("tile_bytes", [1, 4096, 64 * 1024])
@pytest.mark.parametrize("name", sorted(CASES))
def test_torch_backend_goes_over_what_does_not_fit_tile_by_tile(name: str, tile_bytes: int) -> None:
    case = CASES[name]
    inputs = make(case)
    got = TorchPagedAttention(tile_bytes).attend(*inputs).double()
    torch.testing.assert_close(got, dense(*inputs), atol=tolerance(case), rtol=0)


@pytest.mark.parametrize(
    "extra", [{}, {"softcap": 3.0, "sinks": True, "window": 900}, {"key_dim": 24, "value_dim": 16}]
)
def test_torch_backend_takes_no_more_than_a_tile(extra: dict[str, Any]) -> None:
    """Long contexts, many sequences and a long prompt, all at one time: 5 MB of K and V in a quarter of that."""
    sequences = ((1, 900),) * 20 + ((1, 17),) * 20 + ((700, 700), (300, 1200))
    query, k_pages, v_pages, metadata, spec = make(Case(sequences, block_size=16, **extra))
    output = query.numel() * 4
    allowed = sum(length for _, length in sequences) * k_pages.shape[2] * 2 * 16 * 4 // 4
    with LiveBytes((query, k_pages, v_pages)) as live:
        TorchPagedAttention(allowed).attend(query, k_pages, v_pages, metadata, spec)
    assert live.peak <= 2 * output + allowed
    with LiveBytes((query, k_pages, v_pages)) as live:
        TorchPagedAttention(1 << 40).attend(query, k_pages, v_pages, metadata, spec)
    assert live.peak > 2 * output + allowed, "what it would take otherwise"


def test_sequences_of_very_different_lengths_are_not_padded_to_the_longest() -> None:
    query, k_pages, v_pages, metadata, spec = make(Case(((1, 17),) * 60 + ((1, 4000),), block_size=16))
    padded = 61 * 4000 * k_pages.shape[2] * 2 * 16 * 4
    with LiveBytes((query, k_pages, v_pages)) as live:
        TorchPagedAttention().attend(query, k_pages, v_pages, metadata, spec)
    assert live.peak < padded / 8


def test_writing_goes_to_the_slots() -> None:
    query, k_pages, v_pages, metadata, _ = make(CASES["prefill"])
    slots = torch.randperm(k_pages.shape[0] * k_pages.shape[1])[: query.shape[0]]
    key, value = torch.randn(query.shape[0], 2, 16), torch.randn(query.shape[0], 2, 16)
    metadata = replace(metadata, slot_mapping=slots)
    before = k_pages.flatten(0, 1).clone()
    TorchPagedAttention().write(key, value, k_pages, v_pages, metadata)
    assert torch.equal(k_pages.flatten(0, 1)[slots], key)
    assert torch.equal(v_pages.flatten(0, 1)[slots], value)
    others = torch.ones(len(before), dtype=torch.bool)
    others[slots] = False
    assert torch.equal(k_pages.flatten(0, 1)[others], before[others])


def test_triton_kernel_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    tests = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", _INTERPRETED.format(tests=str(tests))],
        env={"TRITON_INTERPRET": "1", "PYTHONPATH": str(tests.parent), "PATH": os.defpath, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("checked") == len(CASES) - 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")
@pytest.mark.parametrize("name", sorted(CASES))
def test_triton_kernel_on_a_gpu(name: str) -> None:
    backend = open_triton("cuda:0")
    assert backend is not None
    case = CASES[name]
    query, k_pages, v_pages, metadata, spec = make(case)
    expected = dense(query, k_pages, v_pages, metadata, spec)
    moved = type(metadata)(
        *(tensor.cuda() for tensor in (
            metadata.slot_mapping, metadata.block_tables, metadata.query_start, metadata.seq_lens,
        )),
        metadata.num_decodes, metadata.host_query_start, metadata.host_seq_lens, metadata.max_query_len,
    )  # fmt: skip
    sinks = spec.sinks.cuda() if spec.sinks is not None else None
    on_gpu = type(spec)(spec.scale, spec.window, spec.softcap, sinks)
    got = backend.attend(query.cuda(), k_pages.cuda(), v_pages.cuda(), moved, on_gpu)
    torch.testing.assert_close(got.cpu().double(), expected, atol=tolerance(case), rtol=0)
