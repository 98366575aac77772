"""Packed bf16 weights: integer products against float64, for every kind of number, and what becomes of a model's
modules and memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from execution.kernel_variants import VARIANTS, load_variant
from torch import nn

from core.execution.attention.select import LinearAdapter
from core.execution.native import (
    NativeKernels,
    NativeLinear,
    PackedLinear,
    pack_linears,
    packing_bytes,
    packs_weights,
    swap_linears,
)
from core.execution.native.packed import exponent_bytes

GROUP = 128
SHAPES = [(16, 16), (48, 128), (320, 272), (80, 1280), (32, 3200)]
ROWS = [1, 2, 3, 5, 6, 7, 16, 23, 64, 121, 130]


@pytest.fixture(scope="module", params=[name for name in VARIANTS if name != "any processor"])
def kernels(request: pytest.FixtureRequest) -> NativeKernels:
    loaded = load_variant(request.param)
    if not loaded.packs:
        pytest.skip("this processor lacks avx2")
    return loaded


def packed(kernels: NativeKernels, weight: torch.Tensor, bias: torch.Tensor | None = None) -> PackedLinear:
    """A packed layer with a copy of the weight `[n, k]`."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).bfloat16().requires_grad_(False)
    linear.weight.copy_(weight)
    if bias is not None:
        linear.bias.copy_(bias)
    model = nn.Sequential(linear)
    assert swap_linears(model, kernels) == pack_linears(model, kernels) == 1
    layer = model[0]
    assert isinstance(layer, PackedLinear)
    return layer


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def group_sums(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Sum over groups of (largest |x|) (sum of |w|) and the other way round: what rounding to units is a part of."""
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.float64)
    for a, b in zip(x.double().abs().split(GROUP, 1), weight.double().abs().split(GROUP, 1), strict=True):
        total += a.amax(1)[:, None] * b.sum(1) + a.sum(1)[:, None] * b.amax(1)
    return total


def assert_exact(layer: PackedLinear, x: torch.Tensor, weight: torch.Tensor, units: float) -> None:
    """Within bf16's rounding of the result (and the smallest bf16), fp32's of the sum, `units` of `group_sums`, and
    half of the smallest unit that W may have."""
    expected = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    bound = expected.abs() * 2.0**-8 + 2.0**-133 + magnitude * 2.0**-22 + group_sums(x, weight) * units
    bound += x.double().abs().sum(1, keepdim=True) * 2.0**-127
    got = layer(x).double()
    assert ((got - expected).abs() <= bound).all()


def outliers(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[:, 3] *= 1000
    x[::2, -1] *= 1000
    return x


def sparse(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[:, : min(GROUP, x.shape[1] // 2)] = 0
    x[0] = 0
    return x


INPUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gaussian": lambda x: x,
    "rows with elements 1000 times the others": outliers,
    "groups of zeros": sparse,
    "denormal": lambda x: (x.float() * 1e-39).bfloat16(),
    "near the smallest": lambda x: (x.float() * 1e-37).bfloat16(),
    "huge": lambda x: (x.float().clamp(-3, 3) * 1e38).bfloat16(),
    "as large as can be": lambda x: torch.full_like(x, torch.finfo(torch.bfloat16).max) * x.sign(),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(kernels: NativeKernels, shape: tuple[int, int], name: str) -> None:
    """2^-12 is the worst case of the format; a unit in which more than a few bits were lost breaks it."""
    n, k = shape
    weight = (gaussian(n, k, seed=1).float() * 1e-4).bfloat16()
    layer = packed(kernels, weight)
    for rows in (1, 7):
        assert_exact(layer, INPUTS[name](gaussian(rows, k, seed=rows)), weight, 2.0**-12)


@pytest.mark.parametrize("name", INPUTS)
def test_weights_of_every_kind(kernels: NativeKernels, name: str) -> None:
    scale = 1e-7 if name in ("huge", "as large as can be") else 1.0
    weight = (INPUTS[name](gaussian(32, 400, seed=5)).float() * scale).bfloat16()
    assert_exact(packed(kernels, weight), gaussian(9, 400, seed=6), weight, 2.0**-12)


def test_typical_numbers_are_nearly_exact(kernels: NativeKernels) -> None:
    """Far below what rounding the result to bf16 costs (1.7e-3). The error before it shows where the result, rounded,
    is taken off again in a group of its own."""
    weight = (gaussian(64, 1280, seed=1).float() * 0.02).bfloat16()
    restored = packed(kernels, weight).weight
    assert (restored == weight).float().mean() > 0.9
    assert ((restored.double() - weight.double()).pow(2).mean() / weight.double().pow(2).mean()).sqrt() < 1e-4
    x = gaussian(1, 1280, seed=2)
    expected = x.double() @ weight.double().T
    taken_off = torch.zeros(64, 16).bfloat16()
    taken_off[:, 0] = -expected[0].bfloat16()
    rest = packed(kernels, torch.cat([weight, taken_off], 1))(torch.cat([x, torch.ones(1, 16).bfloat16()], 1))
    error = rest.double() - (expected - expected.bfloat16().double())
    assert (error.pow(2).mean() / expected.pow(2).mean()).sqrt() < 1e-4


def test_no_sum_overflows(kernels: NativeKernels) -> None:
    """Groups of equal numbers, the largest sums there are: one bit more per factor would overflow 32 bits."""
    for value in (1.0, 255 / 128, 1.5):
        for other in (1.0, 255 / 128):
            weight = torch.full((16, 256), value).bfloat16()
            x = torch.full((2, 256), other).bfloat16()
            x[1, ::2] *= -1
            got = packed(kernels, weight)(x)
            expected = torch.tensor(256 * value * other).bfloat16()
            assert (got[0] == expected).all() and (got[1] == 0).all()
    for alone in range(0, 256, 37):
        x, weight = torch.zeros(1, 256).bfloat16(), torch.zeros(16, 256).bfloat16()
        x[0, alone] = weight[:, alone] = 255 / 128
        assert (packed(kernels, weight)(x) == torch.tensor((255 / 128) ** 2).bfloat16()).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(kernels: NativeKernels, shape: tuple[int, int]) -> None:
    n, k = shape
    layer = packed(kernels, gaussian(n, k, seed=1), gaussian(n, seed=2))
    x = gaussian(260, k, seed=3)
    whole = layer(x)
    assert torch.equal(layer(x[5:6]), whole[5:6])
    for rows in ROWS:
        torch.testing.assert_close(layer(x[:rows]), whole[:rows], rtol=0, atol=0)


def test_neither_threads_nor_shared_inputs_change_a_number(kernels: NativeKernels) -> None:
    layer, before = packed(kernels, gaussian(208, 1536, seed=1)), torch.get_num_threads()
    try:
        for rows in (1, 16, 130):
            x = gaussian(rows, 1536, seed=rows)
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(layer(x))
            assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(before)


def test_views_of_the_input_and_a_bias(kernels: NativeKernels) -> None:
    weight, bias, x = gaussian(48, 64, seed=1), gaussian(48, seed=2), gaussian(6, 64, seed=3)
    layer, plain = packed(kernels, weight, bias), packed(kernels, weight)
    wide = torch.full((6, 100), float("nan")).bfloat16()
    wide[:, 7:71] = x
    expected = layer(x)
    assert torch.equal(layer(wide[:, 7:71]), expected) and torch.equal(layer(x.T.contiguous().T), expected)
    assert torch.equal(layer(x.view(2, 3, 64)), expected.view(2, 3, 48)) and layer(x[:0]).shape == (0, 48)
    torch.testing.assert_close(expected.float(), plain(x).float() + bias.float(), rtol=2.0**-7, atol=2.0**-6)
    with pytest.raises(RuntimeError):
        layer(x.float())


def test_what_is_not_finite_stays_in_its_row(kernels: NativeKernels) -> None:
    weight, x = gaussian(32, 400, seed=1), gaussian(9, 400, seed=2)
    layer = packed(kernels, weight)
    clean = layer(x)
    for value in (float("nan"), float("inf"), -float("inf")):
        broken = x.clone()
        broken[4, 130] = value
        got = layer(broken)
        assert not got[4].isfinite().any()
        keep = [row for row in range(9) if row != 4]
        assert torch.equal(got[keep], clean[keep])


def test_what_is_packed(kernels: NativeKernels) -> None:
    """Shapes and values that the format does not hold, and weights with a second reader, stay as they are."""
    odd = [nn.Linear(17, 16), nn.Linear(16, 17), nn.Linear(16, 16), nn.Linear(16, 16)]
    embedding, head, fine = nn.Embedding(32, 16), nn.Linear(16, 32, bias=False), nn.Linear(32, 16)
    head.weight = embedding.weight
    model = nn.ModuleList([*odd, embedding, head, fine]).bfloat16().requires_grad_(False)
    odd[2].weight[3, 3], odd[3].weight[3, 3] = float("inf"), 2.0**107
    before, table = [linear.weight.clone() for linear in odd], embedding.weight.clone()
    assert packing_bytes(model) == sum(exponent_bytes(16, k) for k in (16, 16, 32)), "at most"
    swap_linears(model, kernels)
    assert pack_linears(model, kernels) == 1
    assert [isinstance(module, PackedLinear) for module in model] == [False] * 6 + [True]
    assert all(torch.equal(module.weight, weight) for module, weight in zip(model, before, strict=False))
    assert isinstance(model[5], NativeLinear) and model[5].weight is embedding.weight
    assert torch.equal(embedding.weight, table)
    assert pack_linears(model, kernels) == 0
    other = nn.Sequential(nn.Linear(16, 16)).requires_grad_(False)
    swap_linears(other, kernels)
    assert pack_linears(other, kernels) == 0, "fp32"


def test_packing_takes_no_second_copy(kernels: NativeKernels) -> None:
    linear = nn.Linear(1280, 640).bfloat16().requires_grad_(False)
    at, weight = linear.weight.data_ptr(), linear.weight.clone()
    shared = nn.ModuleList([linear, nn.Sequential(linear)])
    swap_linears(shared, kernels)
    assert pack_linears(shared, kernels) == 1 and shared[0] is shared[1][0]
    layer = shared[0]
    assert isinstance(layer, PackedLinear) and layer.panels.data_ptr() == at
    assert layer.exponents.nbytes == exponent_bytes(640, 1280) == 6400
    assert not [name for name, _ in layer.named_parameters() if name != "bias"]
    torch.testing.assert_close(layer.weight, weight, rtol=0, atol=2.0**-12 * float(weight.abs().max()))


@pytest.mark.parametrize(
    ("multiplies", "machine", "chosen"), [(False, "x86_64", True), (True, "x86_64", False), (False, "arm64", False)]
)
def test_what_can_be_packed_is_packed_where_that_is_faster(
    kernels: NativeKernels, monkeypatch: pytest.MonkeyPatch, multiplies: bool, machine: str, chosen: bool
) -> None:
    """Not where the processor multiplies bf16 as quickly itself."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: multiplies, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    monkeypatch.setattr("core.execution.native.instructions._is_intel", lambda: False)
    monkeypatch.setattr("platform.machine", lambda: machine)
    model = nn.Sequential(nn.Linear(128, 64)).bfloat16().requires_grad_(False)
    adapter = LinearAdapter(kernels)
    chosen = chosen or (kernels.instructions == "avx2" and machine == "x86_64")  # told to be such a processor
    assert packs_weights(torch.bfloat16, kernels.instructions) == adapter.packs == chosen
    assert adapter.extra_bytes(model) == (64 if chosen else 0)
    adapter(model)
    assert isinstance(model[0], PackedLinear if chosen else NativeLinear)
