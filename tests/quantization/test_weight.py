"""The inner form: what its tensors mean, what they take, and the product that every device can compute."""

from __future__ import annotations

import pytest
import torch
from quantization.forms import FORMS, random_weight

from core.quantization.form import WeightForm
from core.quantization.linear import QuantEmbedding, QuantLinear
from core.quantization.weight import QuantizedWeight, pack, product, unpack

N, K = 40, 288  # more than one super group, the last of them short


@pytest.mark.parametrize("name", FORMS)
def test_a_weight_means_what_the_form_says(name: str) -> None:
    weight, meant = random_weight(FORMS[name], N, K)
    expected = torch.from_numpy(meant).float()
    torch.testing.assert_close(weight.dequantize(), expected, rtol=1e-6, atol=1e-6)
    x = torch.randn(3, 5, K)
    bias = torch.randn(N)
    torch.testing.assert_close(
        product(x, weight, bias), torch.nn.functional.linear(x, expected, bias), rtol=1e-4, atol=1e-4
    )
    taken = weight.take(torch.tensor([7, 0, 39, 7]))
    torch.testing.assert_close(taken, expected[[7, 0, 39, 7]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_modules_hold_what_the_form_says(name: str) -> None:
    form = FORMS[name]
    weight, _ = random_weight(form, N, K)
    linear = QuantLinear(form, K, N, bias=True, dtype=torch.float32)
    assert linear.weight_bytes == form.nbytes(N, K)
    assert linear.num_parameters == N * K + N
    for tensor_name in form.tensors(N, K):
        getattr(linear, tensor_name).copy_(getattr(weight, tensor_name))
    assert linear.bias is not None
    linear.bias.data.normal_()
    x = torch.randn(2, K)
    assert torch.equal(linear(x), product(x, weight, linear.bias))
    torch.testing.assert_close(linear.weight, weight.dequantize())


def test_large_weights_are_dequantized_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, meant = random_weight(FORMS["super"], N, K)
    seen: list[int] = []
    rows = QuantizedWeight.rows
    monkeypatch.setattr(QuantizedWeight, "rows", lambda self, a, b: seen.append(b - a) or rows(self, a, b))
    monkeypatch.setattr("core.quantization.weight.TILE_BYTES", 4 * K * 16)
    x, bias = torch.randn(3, K), torch.randn(N)
    expected = torch.nn.functional.linear(x, torch.from_numpy(meant).float(), bias)
    torch.testing.assert_close(product(x, weight, bias), expected, rtol=1e-4, atol=1e-4)
    assert seen == [16, 16, 8]


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_take_as_many_bits_as_they_have(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (6, 40), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (6, 40 * bits // 8)
    assert torch.equal(unpack(packed, bits, 40), codes)


def test_the_order_of_packed_codes_is_what_kernels_count_on() -> None:
    codes = torch.arange(8, dtype=torch.uint8)[None]
    assert pack(codes, 4).tolist() == [[0x10, 0x32, 0x54, 0x76]]
    assert pack(codes, 3).tolist() == [[0b11100100, 0b11100100, 0b11110000]]  # two bits of each, then the third
    assert pack(codes + 56, 6).tolist() == [[0x98, 0xBA, 0xDC, 0xFE, 0xFF, 0xFF]]


def test_an_embedding_looks_rows_up() -> None:
    weight, meant = random_weight(FORMS["signed super"], N, K)
    table = QuantEmbedding(weight.form, N, K, dtype=torch.bfloat16)
    for name in weight.form.tensors(N, K):
        getattr(table, name).copy_(getattr(weight, name))
    ids = torch.tensor([[3, 39], [0, 3]])
    found = table(ids)
    assert found.shape == (2, 2, K)
    assert torch.equal(found, torch.from_numpy(meant).float()[ids].bfloat16())


class _Kernel:
    """Keeps codes bit-reversed, and computes single rows alone."""

    name = "mirror"

    def __init__(self) -> None:
        self.prepared = 0

    def arrange(self, weight: QuantizedWeight, *, may_change: bool) -> bool:
        if not may_change or weight.form.bits != 8:
            return False
        weight.codes.bitwise_xor_(0xFF)
        return True

    def restored(self, weight: QuantizedWeight) -> QuantizedWeight:
        return QuantizedWeight(weight.form, weight.n, weight.k, weight.codes ^ 0xFF, weight.scale)

    def prepare(self, weight: QuantizedWeight, bias: torch.Tensor | None) -> object:
        self.prepared += 1
        address = weight.codes.data_ptr()

        def run(x: torch.Tensor) -> torch.Tensor | None:
            assert weight.codes.data_ptr() == address
            return None if len(x) > 1 else product(x, self.restored(weight), bias) + 1

        return run


def _linear(form: WeightForm) -> QuantLinear:
    weight, _ = random_weight(form, N, K)
    linear = QuantLinear(form, K, N, dtype=torch.float32)
    for name in form.tensors(N, K):
        getattr(linear, name).copy_(getattr(weight, name))
    return linear


def test_a_kernel_takes_over_what_it_covers() -> None:
    linear, kernel = _linear(FORMS["int8"]), _Kernel()
    one, two = torch.randn(1, K), torch.randn(2, K)
    before, both, dense = linear(one), linear(two), linear.weight
    assert linear.use(kernel)
    assert torch.equal(linear(one), before + 1)
    assert torch.equal(linear(two), both)  # left to the reference
    assert torch.equal(linear.weight, dense)
    linear.codes.data = linear.codes.clone()
    linear.tensors_moved()
    assert torch.equal(linear(one), before + 1)
    assert kernel.prepared == 2
    assert linear.use(kernel)  # a second time changes nothing
    assert torch.equal(linear.weight, dense)


def test_a_kernel_leaves_alone_what_it_does_not_cover_or_others_read() -> None:
    for name, may_change in (("int4", True), ("int8", False)):
        linear = _linear(FORMS[name])
        x = torch.randn(1, K)
        before = linear(x)
        assert not linear.use(_Kernel(), may_change=may_change)
        assert torch.equal(linear(x), before)
