"""The compiled linear kernels against float64, and what they promise about neighbours and threads."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from execution.kernel_variants import VARIANTS, linear, load_variant
from plain_settings import CACHE_DIR
from torch import nn

from core.execution.native import NativeKernels, NativeLinear, NativeRMSNorm, load_native, swap_linears, swap_norms
from core.execution.native.build import build_library
from core.execution.native.instructions import (
    EVERY_ROW,
    FEW_ROWS,
    compiler_flags,
    do_all_products,
    has_bf16_products,
    packs_weights,
)
from core.execution.native.kernels import PreparedLinear

BOUNDS = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-6}
DTYPES = sorted(BOUNDS, key=str)
SHAPES = [(1, 1), (3, 16), (5, 7), (13, 33), (100, 512), (97, 1030), (200, 1536)]


@pytest.fixture(scope="module", params=VARIANTS)
def kernels(request: pytest.FixtureRequest) -> NativeKernels:
    return load_variant(request.param)


def make(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(m * 7919 + n * 31 + k)
    x, weight, bias = (torch.randn(size, generator=generator).to(dtype) for size in ((m, k), (n, k), (n,)))
    return x, weight, bias


def assert_close(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    scale = expected.abs() + x.shape[-1] ** 0.5
    assert ((got.double() - expected).abs() / scale).max() < BOUNDS[x.dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 9, 16, 65, 130])
def test_equals_float64(kernels: NativeKernels, dtype: torch.dtype, m: int) -> None:
    for n, k in SHAPES:
        x, weight, bias = make(m, n, k, dtype)
        assert_close(PreparedLinear(kernels, weight, bias).run(x), x, weight, bias)
        assert_close(linear(kernels, x, weight), x, weight, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(kernels: NativeKernels, dtype: torch.dtype) -> None:
    for n, k in SHAPES:
        x, weight, bias = make(70, n, k, dtype)
        whole = PreparedLinear(kernels, weight, bias).run(x)
        for m in (1, 2, 3, 4, 5, 7, 8, 16, 33, 64):
            torch.testing.assert_close(PreparedLinear(kernels, weight, bias).run(x[:m]), whole[:m], rtol=0, atol=0)


def test_the_number_of_threads_changes_nothing(kernels: NativeKernels) -> None:
    before = torch.get_num_threads()
    try:
        for m in (1, 16, 70):
            x, weight, bias = make(m, 201, 1536, torch.bfloat16)
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(PreparedLinear(kernels, weight, bias).run(x))
            assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(before)


def test_views_and_leading_dimensions(kernels: NativeKernels) -> None:
    x, weight, bias = make(6, 40, 64, torch.bfloat16)
    wide_x, wide_weight = torch.full((6, 100), float("nan")).bfloat16(), torch.full((40, 90), float("nan")).bfloat16()
    wide_x[:, 7:71], wide_weight[:, 3:67] = x, weight
    expected = linear(kernels, x, weight, bias)
    assert torch.equal(linear(kernels, wide_x[:, 7:71], wide_weight[:, 3:67], bias), expected)
    assert torch.equal(linear(kernels, x.view(2, 3, 64), weight, bias), expected.view(2, 3, 40))
    assert torch.equal(linear(kernels, x.T.contiguous().T, weight, bias), expected)
    assert torch.equal(linear(kernels, x, weight.T.contiguous().T, bias), nn.functional.linear(x, weight, bias))
    assert linear(kernels, x[:0], weight, bias).shape == (0, 40)


def test_rows_that_torch_computes_are_close_too(kernels: NativeKernels) -> None:
    x, weight, bias = make(kernels.max_rows[torch.float32] + 1, 64, 96, torch.float32)
    assert_close(linear(kernels, x, weight, bias), x, weight, bias)
    assert_close(PreparedLinear(kernels, weight, bias).run(x), x, weight, bias)


def test_with_bf16_instructions_torch_multiplies_many_rows(
    kernels: NativeKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(kernels.max_rows, torch.bfloat16, 4)
    x, weight, bias = make(5, 64, 96, torch.bfloat16)
    with monkeypatch.context() as patched:
        patched.setattr("torch.nn.functional.linear", lambda *given: torch.zeros(1))
        assert torch.equal(linear(kernels, x[:4], weight, bias), PreparedLinear(kernels, weight, bias).run(x[:4]))
        assert linear(kernels, x, weight, bias).shape == (1,)
    assert_close(linear(kernels, x, weight, bias), x, weight, bias)


def test_special_values(kernels: NativeKernels) -> None:
    for dtype in DTYPES:
        x, weight = torch.ones(5, 16, dtype=dtype), torch.ones(4, 16, dtype=dtype)
        x[1, 3], x[2, 5] = float("nan"), float("inf")
        got = linear(kernels, x, weight)
        assert got[1].isnan().all() and got[2].isposinf().all() and (got[[0, 3, 4]] == 16).all()


def test_concurrent_callers(kernels: NativeKernels) -> None:
    cases = [make(m, 97, 700, torch.bfloat16) for m in (1, 3, 16, 20)]
    expected = [linear(kernels, *case) for case in cases]
    wrong: list[int] = []

    def work(index: int) -> None:
        torch.set_num_threads(1)
        wrong.extend(index for _ in range(50) if not torch.equal(linear(kernels, *cases[index]), expected[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_modules_keep_their_parameters(kernels: NativeKernels) -> None:
    model = nn.Sequential(nn.Linear(32, 48), nn.Sequential(nn.ReLU(), nn.Linear(48, 8, bias=False))).bfloat16()
    before, x = dict(model.named_parameters()), torch.randn(3, 32).bfloat16()
    expected = model(x)
    assert swap_linears(model, kernels) == 2
    assert isinstance(model[0], NativeLinear)
    after = dict(model.named_parameters())
    assert list(before) == list(after) and all(before[name] is after[name] for name in before)
    assert model(x).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)
        for parameter in model.parameters():
            parameter.data = parameter.data * 2
        torch.testing.assert_close(model[0](x), nn.functional.linear(x, model[0].weight, model[0].bias))
        assert model.float()(x.float()).dtype is torch.float32
    assert swap_linears(model, kernels) == 0


def test_a_module_in_two_places_stays_one(kernels: NativeKernels) -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.Sequential(shared))
    assert swap_linears(model, kernels) == 1
    assert model[0] is model[1][0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm(kernels: NativeKernels, dtype: torch.dtype) -> None:
    for rows, k in ((1, 1), (3, 17), (5, 1280)):
        x, weight, _ = make(rows, 1, k, dtype)
        weight = weight[0]
        wide = x.float()
        normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        bounds = {"rtol": 2.0**-7 if dtype == torch.bfloat16 else 2e-3, "atol": 1e-5}
        torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-5), weight * normal.to(dtype), **bounds)


def test_norms_of_a_model_keep_their_meaning(kernels: NativeKernels) -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    norms = [LlamaRMSNorm(80, 1e-6), Gemma3RMSNorm(80, 1e-6), Olmo2RMSNorm(80, 1e-6)]
    model = nn.ModuleList(norms).bfloat16()
    for norm in norms:
        norm.weight.data.normal_()
    names = list(model.state_dict())
    x = torch.randn(2, 3, 80).bfloat16()
    with torch.inference_mode():
        expected = [norm(x) for norm in model]
        assert swap_norms(model, kernels) >= 1
        assert isinstance(model[0], NativeRMSNorm)
        for norm, answer in zip(model, expected, strict=True):
            torch.testing.assert_close(norm(x), answer, rtol=2.0**-7, atol=1e-5)
        wide = LlamaRMSNorm(80, 1e-6)
        mixed = kernels.rms_norm(x, wide.weight, 1e-6)
        torch.testing.assert_close(mixed, wide(x), rtol=0, atol=0)
    assert names == list(model.state_dict())


def test_cache_is_reused() -> None:
    flags = compiler_flags("native")
    built = build_library(CACHE_DIR / "kernels", flags)
    if built is None:
        pytest.skip("no C compiler here")
    stamp = built.stat().st_mtime_ns
    assert build_library(CACHE_DIR / "kernels", flags) == built and load_native(CACHE_DIR / "kernels") is not None
    assert built.stat().st_mtime_ns == stamp
    assert build_library(CACHE_DIR / "kernels", [["-O1"]]) != built, "other flags, other code"


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert load_native(tmp_path) is None


def test_with_a_broken_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.execution.native.build.find_compilers", lambda: [["false"], ["/nonexistent/cc"]])
    assert load_native(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_with_a_damaged_or_foreign_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(b"not a library")
    monkeypatch.setattr("core.execution.native.kernels.build_library", lambda folder, flags: damaged)
    assert load_native(tmp_path) is None
    damaged.chmod(0o666)
    assert load_native(tmp_path) is None


def as_a_processor(monkeypatch: pytest.MonkeyPatch, machine: str, *, bf16: bool, tiles: bool, intel: bool) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("core.execution.native.instructions._is_intel", lambda: intel)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles, raising=False)


@pytest.mark.parametrize(
    ("machine", "bf16", "tiles", "intel", "own", "packed", "every", "fp16"),
    [
        ("x86_64", True, True, True, True, False, True, False),
        ("x86_64", True, False, True, False, True, True, False),  # Intel's AVX-512 alone: integers are quicker
        ("x86_64", True, False, False, True, False, True, False),
        ("x86_64", False, False, True, False, True, True, True),
        ("arm64", False, False, False, False, False, False, False),
    ],
)
def test_who_multiplies_follows_from_the_processor(
    monkeypatch: pytest.MonkeyPatch, machine: str, bf16: bool, tiles: bool, intel: bool, own: bool, packed: bool,
    every: bool, fp16: bool,
) -> None:  # fmt: skip
    """torch's threads are kept out of the way only where torch has no product to compute."""
    as_a_processor(monkeypatch, machine, bf16=bf16, tiles=tiles, intel=intel)
    assert has_bf16_products("native") == own and packs_weights(torch.bfloat16, "native") == packed
    assert do_all_products(torch.bfloat16, "native") == every and do_all_products(torch.float16, "native") == fp16
    assert do_all_products(torch.bfloat16, "avx2") and not has_bf16_products("avx2")
    assert not do_all_products(torch.float32, "native")
    if machine == "x86_64":
        assert packs_weights(torch.bfloat16, "avx2")
        assert has_bf16_products("avx512") == (bf16 and not intel), "no tiles then"


def test_a_library_without_bf16_products_leaves_many_rows_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a compiler that does not know the instructions."""
    as_a_processor(monkeypatch, "x86_64", bf16=True, tiles=True, intel=True)
    kernels = load_variant("any processor")
    assert kernels.half_products == 0 and not kernels.packs and kernels.max_rows[torch.bfloat16] == FEW_ROWS


def test_bf16_products_are_the_processors_own_where_it_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not held back as AVX2; and told to be without tiles, it is."""
    without = load_variant("avx512 bf16")
    assert without.half_products == 1 and load_variant("avx2").half_products == 0
    assert load_variant("this processor").half_products == (2 if torch.cpu._is_amx_tile_supported() else 1)
    assert without.max_rows[torch.bfloat16] == EVERY_ROW
    x, weight, bias = make(9, 64, 96, torch.bfloat16)
    monkeypatch.setattr("torch.nn.functional.linear", None)
    assert_close(linear(without, x, weight, bias), x, weight, bias)


def test_many_rows_against_edges_of_tiles_and_bands(kernels: NativeKernels) -> None:
    for m, n, k in ((257, 33, 100), (300, 70, 31), (530, 16, 64)):
        x, weight, bias = make(m, n, k, torch.bfloat16)
        whole = PreparedLinear(kernels, weight, bias).run(x)
        assert_close(whole, x, weight, bias)
        for rows in (16, 17, 31, 32, 33, 256):
            assert torch.equal(PreparedLinear(kernels, weight, bias).run(x[-rows:]), whole[-rows:])


def test_what_lies_beside_a_weight_is_not_read_into_sums(kernels: NativeKernels) -> None:
    """Rows and elements that are missing at a tile's edge count as zeros, not as whatever lies there."""
    for m, n, k in ((5, 17, 33), (40, 3, 70)):
        x, weight, bias = make(m, n, k, torch.bfloat16)
        beside = torch.full((n + 40, k + 50), float("nan")).bfloat16()
        beside[20 : 20 + n, 11 : 11 + k] = weight
        around = torch.full((m + 40, k + 50), float("inf")).bfloat16()
        around[20 : 20 + m, 7 : 7 + k] = x
        got = PreparedLinear(kernels, beside[20 : 20 + n, 11 : 11 + k], bias).run(around[20 : 20 + m, 7 : 7 + k])
        assert_close(got, x, weight, bias)
