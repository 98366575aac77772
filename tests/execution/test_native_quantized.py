"""Products of quantized weights by the compiled kernels against the dequantized weight."""

from __future__ import annotations

import pytest
import torch
from execution.kernel_variants import VARIANTS, load_variant

from core.execution.attention.select import LinearAdapter
from core.execution.native import NativeKernels, NativeProducts, use_kernels
from core.execution.native.packed import linear_facts
from core.execution.native.quantized import NativeProduct, quantized_facts
from core.quantization.form import SUPER_GROUP, WeightForm
from core.quantization.linear import QuantLinear
from core.quantization.weight import DTYPES, QuantizedWeight

FORMS = {
    "int8": WeightForm(8, 128, offset=128),
    "int8 rows": WeightForm(8, 0, offset=128, scale="float32"),
    "int4": WeightForm(4, 64, zero="float16"),
    "q4_0": WeightForm(4, 32, offset=8),
    "q5_0": WeightForm(5, 32, offset=16),
    "int3": WeightForm(3, 64, zero="uint8"),
    "int2 min": WeightForm(2, 16, scale="uint8", minimum="uint8", supers="float16"),
    "q4_k": WeightForm(4, 32, scale="uint8", minimum="uint8", supers="float16"),
    "q6_k": WeightForm(6, 16, scale="int8", offset=32, supers="float16"),
    "int7": WeightForm(7, 8, offset=64, scale="bfloat16"),
    "nf4": WeightForm(4, 64, scale="float32", codebook="nf4"),
    "fp8 blocks": WeightForm(8, 128, scale="float32", rows=128, fp8="float8_e4m3fn"),
    "fp8": WeightForm(8, 0, scale="float32", rows=0, fp8="float8_e5m2"),
    "ordered": WeightForm(4, 32, zero="uint8", ordered=True),
}
BOUNDS = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-6}


@pytest.fixture(scope="module", params=VARIANTS)
def kernels(request: pytest.FixtureRequest) -> NativeKernels:
    return load_variant(request.param)


def random_layer(form: WeightForm, n: int, k: int, dtype: torch.dtype, bias: bool = False) -> QuantLinear:
    generator = torch.Generator().manual_seed(n * 31 + k)
    layer = QuantLinear(form, k, n, bias=bias, dtype=dtype)
    for name, (shape, kind) in form.tensors(n, k).items():
        buffer = layer.get_buffer(name)
        if name == "order":
            buffer.copy_(torch.randperm(k, generator=generator))
        elif name == "codes" and form.fp8 is not None:
            buffer.copy_(torch.randn(shape, generator=generator).to(DTYPES[form.fp8]).view(torch.uint8))
        elif kind in ("uint8", "int8"):
            high = 256 if name == "codes" else 15
            buffer.copy_(torch.randint(0, high, shape, generator=generator).to(buffer.dtype))
        else:
            buffer.copy_((torch.rand(shape, generator=generator) + 0.5) * 0.02)
    if layer.bias is not None:
        layer.bias.data.normal_(generator=generator)
    return layer


def assert_close(layer: QuantLinear, x: torch.Tensor) -> None:
    with torch.inference_mode():
        got = layer(x)
    weight = layer.weight.double()
    expected = x.double() @ weight.T + (0 if layer.bias is None else layer.bias.double())
    scale = expected.abs() + (weight.abs().mean() * x.shape[-1] ** 0.5)
    assert ((got.double() - expected).abs() / scale).max() < BOUNDS[x.dtype]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_equals_the_dequantized_weight(kernels: NativeKernels, form: WeightForm, dtype: torch.dtype) -> None:
    """A product with numbers that the kernel made, whatever the edges of tiles, lines and groups."""
    for n, k in ((33, 296), (70, 544)):
        layer = random_layer(form, n, k, dtype, bias=n == 33)
        assert layer.use(NativeProducts(kernels)) and layer.prepared is not None
        for m in (1, 5, 40):
            x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
            assert layer.prepared(x) is not None
            assert_close(layer, x)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_row_is_the_same_in_any_batch(kernels: NativeKernels, form: WeightForm) -> None:
    layer = random_layer(form, 70, 1120, torch.bfloat16)
    assert use_kernels(torch.nn.Sequential(layer), kernels) == 1
    x = torch.randn(70, 1120).bfloat16()
    with torch.inference_mode():
        whole = layer(x)
        for m in (1, 2, 4, 5, 16, 17, 32, 33):
            assert torch.equal(layer(x[:m]), whole[:m])


def test_other_shapes_and_dtypes_of_x(kernels: NativeKernels) -> None:
    layer = random_layer(FORMS["int4"], 48, 128, torch.bfloat16, bias=True)
    layer.use(NativeProducts(kernels))
    x = torch.randn(2, 3, 128).bfloat16()
    with torch.inference_mode():
        flat = layer(x.view(6, 128))
        assert torch.equal(layer(x), flat.view(2, 3, 48))
        assert torch.equal(layer(x.view(6, 128).T.contiguous().T), flat)
        assert layer(x[:0]).shape == (0, 3, 48)
        product = layer.prepared
        assert product is not None and product(x.float()) is None, "the bias has another dtype"
        assert product(x.double()) is None


def test_what_the_kernels_do_not_cover_is_left_alone(kernels: NativeKernels) -> None:
    odd = random_layer(WeightForm(4, 20, offset=8), 16, 40, torch.float32)
    assert not odd.use(NativeProducts(kernels)) and odd.prepared is None
    supers = WeightForm(8, 96, scale="uint8", supers="float16")
    assert SUPER_GROUP % 96 and not random_layer(supers, 16, 192, torch.float32).use(NativeProducts(kernels))
    ordered = random_layer(FORMS["ordered"], 16, 64, torch.float32)
    assert ordered.use(NativeProducts(kernels)) and quantized_facts(ordered) is None, "x has to be permuted first"
    plain = random_layer(FORMS["int4"], 16, 64, torch.float32)
    assert quantized_facts(plain) is None, "no kernel was given"
    plain.use(NativeProducts(kernels))
    assert quantized_facts(plain) is not None


def test_a_stage_on_the_cpu_is_given_the_kernels(kernels: NativeKernels) -> None:
    """By the adapter that stages of a device get; whole parts of a layer then know its quantized projections."""
    layer = random_layer(FORMS["q4_0"], 32, 64, torch.bfloat16)
    LinearAdapter(kernels)(torch.nn.Sequential(layer))
    assert isinstance(layer.prepared, NativeProduct)
    facts = linear_facts(layer)
    assert facts is not None and facts.quantized and (facts.n, facts.k) == (32, 64)


def test_tensors_that_moved_are_looked_up_again(kernels: NativeKernels) -> None:
    layer = random_layer(FORMS["q4_0"], 32, 64, torch.float32)
    layer.use(NativeProducts(kernels))
    x = torch.randn(2, 64)
    with torch.inference_mode():
        before = layer(x)
        layer.scale = layer.scale * 2
        layer.tensors_moved()
        torch.testing.assert_close(layer(x), before * 2)


def test_weights_are_what_the_form_says(kernels: NativeKernels) -> None:
    """Numbers are the reference's own, to the last bit, in fp32."""
    for form in FORMS.values():
        layer = random_layer(form, 16, 256, torch.float32)
        stored: QuantizedWeight = layer.stored
        layer.use(NativeProducts(kernels))
        with torch.inference_mode():
            got = layer(torch.eye(256))
        torch.testing.assert_close(got.T, stored.dequantize(), rtol=1e-6, atol=1e-7)
