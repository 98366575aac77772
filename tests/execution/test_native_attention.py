"""The compiled attention kernel against the definition in float64, and what it promises about batches and threads."""

from __future__ import annotations

import threading

import pytest
import torch
from execution.kernel_variants import VARIANTS, load_variant
from execution.paged_cases import CASES, Case, dense, make, tolerance

from core.execution.attention.metadata import AttentionMetadata, AttentionSpec
from core.execution.native import NativeKernels

MORE = {
    "long": Case(((1, 1023), (1, 1024), (1, 1025), (1, 3001), (3, 2050)), heads=4, kv_heads=2),
    "long_window": Case(((1, 3001), (40, 2100)), window=1100, block_size=16),
    "many_heads": Case(((1, 40), (2, 90)), heads=80, kv_heads=2),
    "grouped_by_three": Case(((1, 40), (7, 90)), heads=3, kv_heads=1, key_dim=64, value_dim=64, dtype=torch.bfloat16),
    "wide_heads": Case(((1, 40), (7, 90)), key_dim=256, value_dim=256, dtype=torch.bfloat16),
    "long_prefill": Case(((300, 300), (64, 1500)), key_dim=64, value_dim=64, block_size=16),
    "single_tokens": Case(((1, 1), (1, 1), (1, 2))),
    "float16_everything": Case(((1, 90), (20, 90)), window=17, softcap=5.0, sinks=True, dtype=torch.float16),
}
ALL = CASES | MORE


@pytest.fixture(scope="module", params=VARIANTS)
def kernels(request: pytest.FixtureRequest) -> NativeKernels:
    return load_variant(request.param)


def attend(
    kernels: NativeKernels, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: AttentionMetadata,
    spec: AttentionSpec,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return kernels.paged_attention(
        q, k, v, metadata.block_tables, metadata.query_start, metadata.seq_lens, spec.scale,
        sliding_window=spec.window or 0, softcap=spec.softcap or 0.0, sinks=spec.sinks,
    )  # fmt: skip


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(autouse=True)
def restore_threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", sorted(ALL))
def test_equals_the_definition(kernels: NativeKernels, name: str, threads: int) -> None:
    case = ALL[name]
    q, k, v, metadata, spec = make(case)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)  # what is new is full of NaN
    try:
        assert q.new_empty(3).isnan().all()
        out, lse = attend(kernels, q, k, v, metadata, spec)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(out.double(), dense(q, k, v, metadata, spec), atol=tolerance(case), rtol=0)
    assert lse.isfinite().all()


@pytest.mark.parametrize("name", ["long", "mixed", "everything", "long_window"])
def test_log_sum_exp(kernels: NativeKernels, name: str) -> None:
    """A value that is one everywhere, with a sink: the output says how the sink and the keys share the softmax."""
    case = ALL[name]
    q, k, v, metadata, spec = make(case)
    sinks = torch.linspace(-2, 2, case.heads)
    spec = AttentionSpec(spec.scale, spec.window, spec.softcap, sinks)
    out, lse = attend(kernels, q, k, torch.ones_like(v), metadata, spec)
    expected = 1 / (1 + torch.exp(sinks[None] - lse))
    torch.testing.assert_close(out[..., 0], expected, atol=1e-5, rtol=1e-5)
    without = AttentionSpec(spec.scale, spec.window, spec.softcap, None)
    assert torch.equal(attend(kernels, q, k, v, metadata, without)[1], lse)


@pytest.mark.parametrize("name", ["long", "mixed", "everything", "bfloat16", "long_window", "grouped_by_three"])
def test_the_batch_and_the_threads_change_nothing(kernels: NativeKernels, name: str) -> None:
    q, k, v, metadata, spec = make(ALL[name])
    torch.set_num_threads(1)
    whole, whole_lse = attend(kernels, q, k, v, metadata, spec)
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        again, again_lse = attend(kernels, q, k, v, metadata, spec)
        assert torch.equal(again, whole) and torch.equal(again_lse, whole_lse)
        for index in range(len(metadata.host_seq_lens)):
            first, last = metadata.host_query_start[index : index + 2]
            alone, alone_lse = kernels.paged_attention(
                q[first:last], k, v, metadata.block_tables[index : index + 1],
                torch.tensor([0, last - first], dtype=torch.int32), metadata.seq_lens[index : index + 1], spec.scale,
                sliding_window=spec.window or 0, softcap=spec.softcap or 0.0, sinks=spec.sinks,
            )  # fmt: skip
            assert torch.equal(alone, whole[first:last]) and torch.equal(alone_lse, whole_lse[first:last])


def test_a_token_alone_is_the_token_in_a_prefill(kernels: NativeKernels) -> None:
    """So replaying a sequence as one prefill gives the same bits as decoding it did."""
    q, k, v, metadata, spec = make(Case(((70, 1100),), heads=6, kv_heads=2, dtype=torch.bfloat16))
    whole, _ = attend(kernels, q, k, v, metadata, spec)
    for row in (0, 13, 69):
        alone, _ = kernels.paged_attention(
            q[row : row + 1], k, v, metadata.block_tables, torch.tensor([0, 1], dtype=torch.int32),
            torch.tensor([1100 - 69 + row], dtype=torch.int32), spec.scale,
        )  # fmt: skip
        assert torch.equal(alone[0], whole[row])


def test_strided_tensors(kernels: NativeKernels) -> None:
    q, k, v, metadata, spec = make(CASES["mixed"])
    expected, _ = attend(kernels, q, k, v, metadata, spec)
    by_head = q.transpose(0, 1).contiguous().transpose(0, 1)
    padded = torch.full((*q.shape[:2], 40), float("nan"))[..., 3 : 3 + q.shape[2]]
    padded.copy_(q)
    joined = torch.full((k.shape[0], 2, *k.shape[1:]), float("nan"))
    joined[:, 0], joined[:, 1] = k, v
    for queries in (by_head, padded, q.transpose(1, 2).contiguous().transpose(1, 2)):
        assert torch.equal(attend(kernels, queries, joined[:, 0], joined[:, 1], metadata, spec)[0], expected)


def test_parts_merge_to_the_whole(kernels: NativeKernels) -> None:
    """Pages at two sites: each answers for all its keys, and the log-sum-exps weigh the answers."""
    q, k, v, metadata, spec = make(Case(((1, 64), (1, 96)), block_size=16))
    whole, whole_lse = attend(kernels, q, k, v, metadata, spec)
    parts = []
    for blocks, lengths in ((slice(0, 2), [32, 32]), (slice(2, None), [32, 64])):
        tables, held = metadata.block_tables[:, blocks], torch.tensor(lengths, dtype=torch.int32)
        bounds = (torch.zeros_like(held), held)
        parts.append(kernels.paged_attention(q, k, v, tables, metadata.query_start, held, spec.scale, bounds=bounds))
    lse = torch.stack([part[1] for part in parts])
    weights = torch.exp(lse - whole_lse)[..., None]
    torch.testing.assert_close((torch.stack([part[0] for part in parts]) * weights).sum(0), whole)
    torch.testing.assert_close(torch.logsumexp(lse, 0), whole_lse)


def test_rows_without_keys(kernels: NativeKernels) -> None:
    q, k, v, metadata, spec = make(CASES["decode"])
    lengths = metadata.seq_lens.clone()
    lengths[1] = 0
    sinks = torch.zeros(q.shape[1])
    for given in (None, sinks):
        out, lse = kernels.paged_attention(
            q, k, v, metadata.block_tables, metadata.query_start, lengths, spec.scale, sinks=given
        )
        assert (out[1] == 0).all() and lse[1].isneginf().all() and lse[[0, 2, 3]].isfinite().all()
    nothing, _ = kernels.paged_attention(
        q[:0], k, v, metadata.block_tables[:0], torch.zeros(1, dtype=torch.int32), lengths[:0], spec.scale
    )
    assert nothing.shape[0] == 0


def test_large_scores(kernels: NativeKernels) -> None:
    q, k, v, metadata, _ = make(CASES["mixed"])
    spec = AttentionSpec(scale=200.0)
    out, lse = attend(kernels, q, k, v, metadata, spec)
    torch.testing.assert_close(out.double(), dense(q, k, v, metadata, spec), atol=2e-3, rtol=0)
    assert lse.isfinite().all()


def test_unfit_arguments(kernels: NativeKernels) -> None:
    q, k, v, metadata, spec = make(CASES["decode"])
    with pytest.raises(TypeError):
        attend(kernels, q.bfloat16(), k, v, metadata, spec)
    with pytest.raises(ValueError, match="do not fit"):
        attend(kernels, q[:, :3], k, v, metadata, spec)
    with pytest.raises(TypeError):
        kernels.paged_attention(
            q, k, v, metadata.block_tables.long(), metadata.query_start, metadata.seq_lens, spec.scale
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_write_kv(kernels: NativeKernels, dtype: torch.dtype) -> None:
    k_pages, v_pages = torch.zeros(7, 4, 2, 24).to(dtype), torch.zeros(7, 4, 2, 16).to(dtype)
    key = torch.randn(2, 5, 24).to(dtype).transpose(0, 1)
    value = torch.randn(5, 2, 16).to(dtype)
    slots = torch.tensor([3, 27, 0, 14, 9])
    kernels.write_kv(key, value, k_pages, v_pages, slots)
    for pages, rows in ((k_pages, key), (v_pages, value)):
        expected = torch.zeros_like(pages)
        expected.view(28, 2, -1)[slots] = rows
        assert torch.equal(pages, expected)
    kernels.write_kv(key[:1], value[:1], k_pages, v_pages, torch.tensor([-1]))
    assert torch.equal(k_pages.view(28, 2, -1)[slots], key)


def test_concurrent_callers(kernels: NativeKernels) -> None:
    inputs = [make(ALL[name]) for name in ("long", "mixed", "everything", "bfloat16")]
    expected = [attend(kernels, *each)[0] for each in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        torch.set_num_threads(1 + index % 2)
        wrong.extend(index for _ in range(30) if not torch.equal(attend(kernels, *inputs[index])[0], expected[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
