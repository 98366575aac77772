"""Attention over KV that lies at several sites: bounds, partial results, and their merge, for every backend."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from execution.paged_cases import Case, dense, make, tolerance
from execution.partial_cases import SPREADS, merged, part_by_definition, parts_of, spread, visible_keys
from hypothesis import given, settings
from hypothesis import strategies as st

from core.execution.attention.interface import AttentionBackend
from core.execution.attention.merge import combine
from core.execution.attention.metadata import AttentionSpec, SiteBatch, build_site_batch
from core.execution.attention.native_paged import NativePagedAttention
from core.execution.attention.torch_paged import TorchPagedAttention
from core.execution.attention.triton_probe import open_triton
from core.execution.native import load_native

_INTERPRETED = """
import sys
sys.path.insert(0, {tests!r})
from execution.paged_cases import dense, make, tolerance
from execution.partial_cases import SPREADS, part_by_definition, parts_of, spread
from core.execution.attention.triton_paged import TritonPagedAttention
from core.execution.attention.triton_variants import GpuLimits
import torch
BACKEND = TritonPagedAttention(GpuLimits("cuda", 86, 99 * 1024))
for name, case in SPREADS.items():
    if case.dtype is torch.bfloat16 or name.startswith("long"):
        continue  # numpy, which the interpreter computes with, has no bf16; and long cases take it minutes
    query, k, v, metadata, spec = make(case)
    held = spread(k, v, metadata, 3, seed=1)
    parts = parts_of(BACKEND, query, held, spec)
    got = BACKEND.merge(parts, spec.sinks, query.dtype).double()
    worst = (got - dense(query, k, v, metadata, spec)).abs().max().item()
    assert worst < tolerance(case), (name, worst)
    for site, (out, lse) in zip(held, parts):
        assert out.dtype == lse.dtype == torch.float32
        expected = part_by_definition(query, site, metadata, spec)
        torch.testing.assert_close(out.double(), expected[0], atol=tolerance(case), rtol=0)
        torch.testing.assert_close(lse.double(), expected[1], atol=1e-4, rtol=0)
    print("checked", name)
"""


@pytest.fixture(scope="module", params=["torch", "torch in tiles", "native"])
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AttentionBackend:
    if request.param.startswith("torch"):
        return TorchPagedAttention(1 if request.param.endswith("tiles") else None)  # a page of keys at a time
    kernels = load_native(tmp_path_factory.getbasetemp().parent / "kernels")
    if kernels is None:
        pytest.skip("no C compiler here")
    return NativePagedAttention(kernels)


@pytest.mark.parametrize("name", sorted(SPREADS))
def test_each_part_is_what_the_definition_says(backend: AttentionBackend, name: str) -> None:
    case = SPREADS[name]
    query, k_pages, v_pages, metadata, spec = make(case)
    sites = spread(k_pages, v_pages, metadata, 3, seed=1)
    for site, (out, lse) in zip(sites, parts_of(backend, query, sites, spec), strict=True):
        assert out.dtype == lse.dtype == torch.float32
        expected_out, expected_lse = part_by_definition(query, site, metadata, spec)
        torch.testing.assert_close(out.double(), expected_out, atol=2e-5, rtol=0)
        torch.testing.assert_close(lse.double(), expected_lse, atol=2e-5, rtol=0)
        assert (out[lse.isneginf()] == 0).all()


@pytest.mark.parametrize("sites", [1, 2, 4])
@pytest.mark.parametrize("name", sorted(SPREADS))
def test_merged_parts_are_the_whole(backend: AttentionBackend, name: str, sites: int) -> None:
    """Against float64, no worse than attention over the same pages at one place."""
    query, k_pages, v_pages, metadata, spec = make(SPREADS[name])
    expected = dense(query, k_pages, v_pages, metadata, spec)
    whole = backend.attend(query, k_pages, v_pages, metadata, spec)
    got = merged(backend, query, spread(k_pages, v_pages, metadata, sites, seed=sites), spec)
    assert got.dtype == whole.dtype
    if query.dtype is torch.float32:
        torch.testing.assert_close(got, whole, atol=1e-5, rtol=1e-5)
    wrong, allowed = ((result.double() - expected).square().mean().sqrt() for result in (got, whole))
    assert wrong <= 1.05 * allowed + 1e-6


@st.composite
def _cases(draw: st.DrawFn) -> Case:
    length = st.integers(1, 60)
    decodes = draw(st.lists(length.map(lambda n: (1, n)), max_size=4))
    chunks = st.tuples(st.integers(2, 40), st.integers(0, 50)).map(lambda pair: (pair[0], sum(pair)))
    prefills = draw(st.lists(chunks, min_size=not decodes, max_size=2))
    kv_heads, group = draw(st.sampled_from(((1, 1), (2, 1), (2, 2), (1, 5))))
    return Case(
        (*decodes, *prefills), heads=kv_heads * group, kv_heads=kv_heads, block_size=draw(st.sampled_from((2, 4, 16))),
        window=draw(st.none() | st.integers(1, 40)), softcap=draw(st.none() | st.just(1.5)), sinks=draw(st.booleans()),
        dtype=draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16))),
    )  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(case=_cases(), sites=st.integers(1, 4), seed=st.integers(0, 1000))
def test_any_spread_of_any_batch(backend: AttentionBackend, case: Case, sites: int, seed: int) -> None:
    query, k_pages, v_pages, metadata, spec = make(case, seed)
    held = spread(k_pages, v_pages, metadata, sites, seed)
    got = merged(backend, query, held, spec)
    torch.testing.assert_close(
        got.double(), dense(query, k_pages, v_pages, metadata, spec), atol=tolerance(case), rtol=0
    )
    if case.dtype is torch.float32:
        torch.testing.assert_close(got, backend.attend(query, k_pages, v_pages, metadata, spec), atol=1e-5, rtol=1e-5)


@settings(max_examples=80, deadline=None)
@given(case=_cases(), sites=st.integers(1, 4), seed=st.integers(0, 1000))
def test_bounds(case: Case, sites: int, seed: int) -> None:
    _, k_pages, v_pages, metadata, _ = make(case, seed)
    starts = metadata.host_query_start
    for site in spread(k_pages, v_pages, metadata, sites, seed):
        lo, hi = site.batch.bounds(case.window)
        assert lo.dtype == hi.dtype == torch.int32 and len(lo) == len(hi) == starts[-1]
        for sequence, length in enumerate(metadata.host_seq_lens):
            for row in range(starts[sequence], starts[sequence + 1]):
                position = length - (starts[sequence + 1] - row)
                seen = visible_keys(site, length, sequence, position, case.window)
                assert list(range(int(lo[row]), int(hi[row]))) == seen


def test_bounds_are_worked_out_once_per_window() -> None:
    site = build_site_batch(
        [np.array([3, 1]), np.array([], dtype=np.int32)], [np.array([0, 2]), np.array([], dtype=np.int32)], [7, 0],
        [2, 1], np.array([9, 13, 4]), 4, torch.device("cpu"),
    )  # fmt: skip
    assert site.block_tables.tolist() == [[3, 1], [0, 0]] and site.seq_lens.tolist() == [7, 0]
    assert site.query_start.tolist() == [0, 2, 3] and site.host_query_start == (0, 2, 3)
    assert [bound.tolist() for bound in site.bounds(None)] == [[0, 0, 0], [6, 7, 0]]
    assert [bound.tolist() for bound in site.bounds(8)] == [[2, 4, 0], [6, 7, 0]]
    assert site.bounds(8)[0] is site.bounds(8)[0] and site.bounds(None)[1] is site.bounds(None)[1]


def test_a_batch_without_a_key_at_the_site(backend: AttentionBackend) -> None:
    query, k_pages, v_pages, metadata, spec = make(SPREADS["sinks"])
    empty = spread(k_pages, v_pages, metadata, 1, seed=0)[0].batch
    nothing = [np.array([], dtype=np.int32)] * 2
    site = build_site_batch(nothing, nothing, [0, 0], [1, 9], empty.query_at, 4, torch.device("cpu"))
    out, lse = backend.attend_partial(query, k_pages, v_pages, site, spec)
    assert out.shape == (10, 4, 16) and (out == 0).all() and lse.isneginf().all()


def test_a_site_alone_gives_the_whole_to_the_bit(backend: AttentionBackend) -> None:
    """With all pages at one site the kernel walks the same keys in the same order."""
    if backend.name != "native":
        pytest.skip("torch computes parts by hand and wholes by SDPA")
    for name, case in SPREADS.items():
        query, k_pages, v_pages, metadata, spec = make(replace(case, sinks=False))
        site = spread(k_pages, v_pages, metadata, 1, seed=0)
        assert torch.equal(
            merged(backend, query, site, spec), backend.attend(query, k_pages, v_pages, metadata, spec)
        ), name


def test_merging(backend: AttentionBackend) -> None:
    """Against the formula, with rows that some parts, or all, have no key for; grouping parts changes nothing."""
    generator = torch.Generator().manual_seed(4)
    lses = torch.randn(4, 6, 3, generator=generator) * 20
    lses[0, 1], lses[2, :3], lses[:, 5] = -torch.inf, -torch.inf, -torch.inf
    outs = torch.where(lses.isneginf()[..., None], 0.0, torch.randn(4, 6, 3, 11, generator=generator))
    sinks = torch.tensor([-3.0, 0.5, 30.0])
    parts = list(zip(outs, lses, strict=True))
    for given_sinks in (None, sinks):
        top = lses.amax(0) if given_sinks is None else torch.maximum(lses.amax(0), given_sinks)
        top = top.double().nan_to_num(neginf=0.0)
        scale = torch.exp(lses.double() - top)
        total = scale.sum(0) + (0 if given_sinks is None else torch.exp(given_sinks.double() - top))
        expected = (outs * scale[..., None]).sum(0) / total.clamp(min=1e-30)[..., None]
        got = backend.merge(parts, given_sinks, torch.float32)
        torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-6)
        assert (got[5] == 0).all()
        grouped = [combine(parts[:3]), combine(parts[3:])]
        torch.testing.assert_close(backend.merge(grouped, given_sinks, torch.float32), got)
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(backend.merge(parts, given_sinks, dtype), got.to(dtype))
    assert torch.equal(combine(parts)[1], lses.logsumexp(0)) and combine(parts)[1][5].isneginf().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_a_single_part(backend: AttentionBackend, dtype: torch.dtype) -> None:
    out, lse = torch.randn(3, 2, 4), torch.zeros(3, 2)
    assert torch.equal(backend.merge([(out, lse)], None, dtype), out.to(dtype))
    halved = backend.merge([(out, lse)], torch.zeros(2, dtype=dtype), dtype)
    assert torch.equal(halved, (out / 2).to(dtype)) and halved.dtype == dtype


def test_scores_too_large_to_exponentiate(backend: AttentionBackend) -> None:
    query, k_pages, v_pages, metadata, _ = make(SPREADS["mixed"])
    spec = AttentionSpec(scale=200.0)
    sites = spread(k_pages, v_pages, metadata, 3, seed=0)
    got = merged(backend, query, sites, spec).double()
    torch.testing.assert_close(got, dense(query, k_pages, v_pages, metadata, spec), atol=2e-3, rtol=0)


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
    assert done.stdout.count("checked") == len(SPREADS) - 4


def test_a_row_never_depends_on_the_batch(backend: AttentionBackend) -> None:
    """Parts and their merge: a sequence alone, and with any number of threads, gives the same bits."""
    if backend.name != "native":
        pytest.skip("a promise of the native kernels")
    query, k_pages, v_pages, metadata, spec = make(replace(SPREADS["long"], dtype=torch.bfloat16, sinks=True))
    sites = spread(k_pages, v_pages, metadata, 2, seed=0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = merged(backend, query, sites, spec)
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(merged(backend, query, sites, spec), whole)
            for index in range(len(metadata.host_seq_lens)):
                rows = slice(*metadata.host_query_start[index : index + 2])
                alone = [replace(site, batch=_only(site.batch, index)) for site in sites]
                assert torch.equal(merged(backend, query[rows], alone, spec), whole[rows])
    finally:
        torch.set_num_threads(threads)


def _only(batch: SiteBatch, index: int) -> SiteBatch:
    """The batch of one sequence of a batch."""
    first, last = batch.host_query_start[index : index + 2]
    return build_site_batch(
        [batch.block_tables[index].numpy()], [batch.block_index[index]], [batch.host_seq_lens[index]], [last - first],
        batch.query_at[first:last], batch.block_size, torch.device("cpu"),
    )  # fmt: skip


def test_unfit_parts(backend: AttentionBackend) -> None:
    if not isinstance(backend, NativePagedAttention):
        pytest.skip("torch checks its own")
    out, lse = torch.zeros(3, 2, 4), torch.zeros(3, 2)
    with pytest.raises(ValueError, match="differ in shape"):
        backend.merge([(out, lse), (out[:2], lse[:2])], None, torch.float32)
    with pytest.raises(TypeError):
        backend.merge([(out.half(), lse)], None, torch.float32)
    query, k_pages, v_pages, metadata, spec = make(SPREADS["decode"])
    site = spread(k_pages, v_pages, metadata, 1, seed=0)[0]
    with pytest.raises(ValueError, match="bounds"):
        backend.attend_partial(query[:2], site.k_pages, site.v_pages, site.batch, spec)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")
@pytest.mark.parametrize("name", sorted(SPREADS))
def test_triton_kernel_on_a_gpu(name: str) -> None:
    backend = open_triton("cuda:0")
    assert backend is not None
    query, k_pages, v_pages, metadata, spec = make(SPREADS[name])
    expected = dense(query, k_pages, v_pages, metadata, spec)
    sinks = spec.sinks.cuda() if spec.sinks is not None else None
    sites = spread(k_pages.cuda(), v_pages.cuda(), metadata, 3, seed=0)
    got = merged(backend, query.cuda(), sites, replace(spec, sinks=sinks))
    torch.testing.assert_close(got.cpu().double(), expected, atol=tolerance(SPREADS[name]), rtol=0)
