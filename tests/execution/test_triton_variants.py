"""Which tile of the Triton kernel a card gets, as a table; and that what serving launches was known from the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from execution.paged_cases import CASES, Case, make
from execution.partial_cases import SPREADS, spread
from tiny_models import TINY, build_tiny

from core.errors import UnsupportedModelError
from core.execution.attention.metadata import AttentionMetadata, AttentionSpec, build_site_batch
from core.execution.attention.torch_paged import TorchPagedAttention
from core.execution.attention.triton_variants import (
    AttentionKind,
    GpuLimits,
    Heads,
    choose_tile,
    kind_of,
    shared_bytes,
    variants_of,
)
from core.inference_pipeline import InferencePipeline
from core.request import SamplingParams

KIB = 1024
CARDS = {
    "sm_75": GpuLimits("cuda", 75, 64 * KIB),
    "sm_80": GpuLimits("cuda", 80, 163 * KIB),
    "sm_86": GpuLimits("cuda", 86, 99 * KIB),
    "sm_90": GpuLimits("cuda", 90, 227 * KIB),
    "sm_120": GpuLimits("cuda", 120, 99 * KIB),
    "gfx942": GpuLimits("hip", 0, 64 * KIB, 64),
    "gfx1100": GpuLimits("hip", 0, 64 * KIB, 32),
}
FP16, FP32 = torch.float16, torch.float32


@pytest.mark.parametrize(
    ("card", "dims", "dtype", "group", "is_prefill", "expected"),
    [
        ("sm_86", (64, 64), FP16, 4, True, (64, 64, 3, 4)),
        ("sm_86", (128, 128), FP16, 4, True, (64, 64, 3, 4)),
        ("sm_86", (128, 128), FP16, 4, False, (16, 64, 3, 4)),
        ("sm_86", (128, 128), FP16, 71, False, (64, 64, 3, 4)),
        ("sm_86", (192, 128), FP16, 1, True, (64, 64, 3, 4)),
        ("sm_86", (256, 256), FP16, 2, True, (64, 32, 3, 8)),  # 64 keys need 107,008 bytes
        ("sm_120", (256, 256), FP16, 2, True, (64, 32, 3, 8)),
        ("sm_80", (256, 256), FP16, 2, True, (64, 64, 3, 8)),
        ("sm_90", (256, 256), FP16, 2, True, (64, 64, 3, 8)),
        ("gfx942", (256, 256), FP16, 2, True, (64, 32, 3, 8)),
        ("sm_75", (128, 128), FP16, 4, True, (16, 32, 3, 4)),  # without tensor cores
        ("sm_75", (64, 64), FP16, 4, False, (16, 32, 3, 4)),
        ("sm_86", (64, 64), FP32, 4, True, (32, 32, 3, 4)),
        ("sm_86", (128, 128), FP32, 4, True, (16, 32, 3, 4)),
        ("gfx1100", (128, 128), FP16, 4, True, (32, 32, 1, 4)),
    ],
)
def test_tiles(
    card: str, dims: tuple[int, int], dtype: torch.dtype, group: int, is_prefill: bool, expected: tuple[int, ...]
) -> None:
    tile = choose_tile(Heads(8, group, *dims, dtype), is_prefill, CARDS[card])
    assert (tile.rows, tile.keys, tile.stages, tile.warps) == expected


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP16, FP32], ids=str)
def test_every_head_size_fits_every_card(card: str, dtype: torch.dtype) -> None:
    for dims in ((16, 16), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)):
        for group in (1, 4, 7, 71):
            for is_prefill in (False, True):
                heads = Heads(8, group, *dims, dtype)
                assert shared_bytes(heads, choose_tile(heads, is_prefill, CARDS[card]), CARDS[card]) <= (
                    CARDS[card].shared_bytes
                )


def test_heads_that_fit_no_tile_are_refused_with_their_size() -> None:
    with pytest.raises(UnsupportedModelError, match=r"heads of 2048 and 2048 numbers in float32 .* 65536 bytes"):
        choose_tile(Heads(1, 1, 2048, 2048, FP32), False, CARDS["sm_75"])


class _Recorder:
    """Stands for the kernel: Triton's own key for each launch, by which it knows what it has compiled."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import create_function_from_signature

        from core.execution.attention import triton_paged

        kernel = triton_paged._paged_attention
        self.keys: set[str] = set()
        backend = make_backend(GPUTarget("cuda", 86, 32))
        self._bind = create_function_from_signature(kernel.signature, kernel.params, backend)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: object, **kwargs: object) -> None:
            _, specialization, options = self._bind(*args, **kwargs)
            self.keys.add(str(specialization) + str(options))

        return launch


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> _Recorder:
    pytest.importorskip("triton")
    from core.execution.attention import triton_paged

    made = _Recorder()
    monkeypatch.setattr(triton_paged, "_paged_attention", made)
    return made


ODD = {
    "sixteen_sequences": Case(((1, 48),) * 16, window=16),
    "one_token": Case(((1, 1),), window=1),
    "wide_tables": Case(((1, 2000), (1, 3)), block_size=4),
    "tables_of_sixteen": Case(((1, 60), (2, 3)), block_size=4),
}


@pytest.mark.parametrize("name", sorted(CASES | ODD))
def test_serving_compiles_nothing_that_the_warm_up_did_not(name: str, recorder: _Recorder) -> None:
    """Batches of any size, addresses and windows of any alignment: Triton's keys are those of the warm-up."""
    from core.execution.attention.triton_paged import TritonPagedAttention

    backend, case = TritonPagedAttention(CARDS["sm_86"]), (CASES | ODD)[name]
    query, k_pages, v_pages, metadata, spec = make(case)
    kind, cpu, seen = kind_of(query, k_pages, v_pages, spec), torch.device("cpu"), list[tuple[int, int]]()
    for partial in (False, True):
        backend.warm_up([kind], cpu, partial=partial, on_kernel=lambda done, total: seen.append((done, total)))
    known = set(recorder.keys)
    assert seen == [(1, 2), (2, 2)] * 2 and len(known) == 4
    for sites in (1, 3):
        for site in spread(k_pages, v_pages, metadata, sites, seed=0):
            backend.attend_partial(query, site.k_pages, site.v_pages, site.batch, spec)
    odd_place = torch.cat((metadata.block_tables.flatten()[:1], metadata.block_tables.flatten()))[1:]
    tables = odd_place.view(metadata.block_tables.shape)
    strided = torch.empty(*query.shape[:2], 2 * query.shape[2], dtype=query.dtype)[..., : query.shape[2]]
    unaligned = torch.empty(query.numel() + 1, dtype=query.dtype)[1:].view(query.shape)
    for batch in (metadata, replace(metadata, block_tables=tables)):
        for asked in (query, strided, unaligned):
            backend.attend(asked, k_pages, v_pages, batch, replace(spec, scale=1))
    assert recorder.keys == known


def test_a_kind_that_differs_is_another_kernel(recorder: _Recorder) -> None:
    """The keys tell apart what they should: otherwise the test above could not fail."""
    from core.execution.attention.triton_paged import TritonPagedAttention

    backend, counts = TritonPagedAttention(CARDS["sm_86"]), []
    for name in (
        "decode",
        "prefill",
        "window",
        "softcap",
        "sinks",
        "one_head_per_kv",
        "odd_dim",
        "large_pages",
        "float16",
    ):
        query, k_pages, v_pages, metadata, spec = make(CASES[name])
        backend.attend(query, k_pages, v_pages, metadata, spec)
        counts.append(len(recorder.keys))
    assert counts == list(range(1, 10))


def test_the_longest_query_is_counted_once() -> None:
    _, k_pages, v_pages, metadata, _ = make(SPREADS["mixed"])
    assert metadata.max_query_len == 40
    assert {site.batch.max_query_len for site in spread(k_pages, v_pages, metadata, 3, seed=0)} == {40}
    empty = build_site_batch([], [], [], [], np.zeros(0, dtype=np.int32), 4, torch.device("cpu"))
    assert empty.max_query_len == 0


@pytest.mark.parametrize("name", sorted(TINY))
def test_a_models_kinds_are_those_that_it_asks_for(
    name: str, tmp_path: Path, open_pipeline: Callable[..., InferencePipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    build_tiny(name, tmp_path)
    asked: set[AttentionKind] = set()
    ready: list[tuple[set[AttentionKind], bool]] = []
    attend = TorchPagedAttention.attend

    def warm_up(
        self: TorchPagedAttention, kinds: Iterable[AttentionKind], device: torch.device, *, partial: bool, **_: object
    ) -> None:
        ready.append((set(kinds), partial))

    def recording(
        self: TorchPagedAttention, query: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor,
        metadata: AttentionMetadata, spec: AttentionSpec,
    ) -> torch.Tensor:  # fmt: skip
        asked.add(kind_of(query, k_pages, v_pages, spec))
        return attend(self, query, k_pages, v_pages, metadata, spec)

    monkeypatch.setattr(TorchPagedAttention, "warm_up", warm_up)
    monkeypatch.setattr(TorchPagedAttention, "attend", recording)
    pipeline = open_pipeline(tmp_path, engine__native_kernels=False, engine__kv_cache_tokens=256)
    made_ready = list(ready)
    pipeline.submit([5, 6, 7], SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)).result()
    (stage,) = pipeline.engine.stages
    assert stage.attention_kinds() == asked
    assert made_ready == ready == [(asked, False), (asked, True)], "when it is loaded, and also for pages that are lent"
    limits = CARDS["sm_86"]
    assert len(variants_of(stage.attention_kinds(), limits, partial=False)) == 2 * len(asked)
