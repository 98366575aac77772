"""Products of quantized weights from panels, by 16-bit integers, against float64; and what becomes of their tensors."""

from __future__ import annotations

import pytest
import torch
from execution.kernel_variants import VARIANTS, load_variant
from execution.test_native_quantized import random_layer
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from core.execution.native import (
    NativeKernels,
    NativeProducts,
    PanelProducts,
    covers_panels,
    swap_layers,
    use_kernels,
)
from core.execution.native.quantized import NativeProduct
from core.quantization.form import WeightForm
from core.quantization.linear import QuantEmbedding, QuantLinear
from core.quantization.weight import QuantizedWeight

FORMS = {
    "int8": WeightForm(8, 128, offset=128),
    "int8 rows": WeightForm(8, 0, offset=128, scale="float32"),
    "int8 tensor": WeightForm(8, 0, rows=0, offset=128, scale="float32"),
    "int8 blocks": WeightForm(8, 128, rows=32, offset=128, scale="bfloat16"),
    "q8_0": WeightForm(8, 32, offset=128),
    "int4": WeightForm(4, 64, zero="float16"),
    "int4 wide": WeightForm(4, 256, zero="uint8"),
    "q4_0": WeightForm(4, 32, offset=8),
    "q4_1": WeightForm(4, 32, minimum="float16"),
    "q5_0": WeightForm(5, 32, offset=16),
    "int3": WeightForm(3, 64, zero="uint8"),
    "q2_k": WeightForm(2, 16, scale="uint8", minimum="uint8", supers="float16"),
    "q3_k": WeightForm(3, 16, scale="int8", offset=4, supers="float16"),
    "q4_k": WeightForm(4, 32, scale="uint8", minimum="uint8", supers="float16"),
    "q5_k": WeightForm(5, 32, scale="uint8", minimum="uint8", supers="float32"),
    "q6_k": WeightForm(6, 16, scale="int8", offset=32, supers="float16"),
    "int7": WeightForm(7, 64, offset=64, scale="bfloat16"),
    "iq4_nl": WeightForm(4, 32, codebook="iq4_nl"),
    "iq4_xs": WeightForm(4, 32, scale="int8", codebook="iq4_nl", supers="float16"),
    "ordered": WeightForm(4, 32, zero="uint8", ordered=True),
}
SHAPES = [(16, 32), (48, 288), (32, 1120)]
ROWS = [1, 2, 5, 7, 16, 125]
BOUNDS = {torch.bfloat16: 4.5e-3, torch.float16: 6e-4, torch.float32: 1e-6}


@pytest.fixture(scope="module", params=[name for name in VARIANTS if name != "any processor"])
def kernels(request: pytest.FixtureRequest) -> NativeKernels:
    loaded = load_variant(request.param)
    if not loaded.has_panels:
        pytest.skip("this processor has a faster way, or lacks avx2")
    loaded.num_threads = lambda: 1
    return loaded


def arranged(kernels: NativeKernels, form: WeightForm, n: int, k: int, dtype: torch.dtype) -> QuantLinear:
    layer = random_layer(form, n, k, dtype, bias=n % 32 == 16)
    assert layer.use(PanelProducts(kernels))
    return layer


def rows_of(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(k)).to(dtype)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_equals_the_weight_in_float64(kernels: NativeKernels, form: WeightForm, dtype: torch.dtype) -> None:
    """Whatever the edges of tiles, bands, chunks and spans; a row is the same in any batch."""
    for n, k in SHAPES:
        layer = arranged(kernels, form, n, k, dtype)
        assert isinstance(layer.prepared, NativeProduct)
        dense = layer.quantized.dequantize().double()
        bias = 0 if layer.bias is None else layer.bias.double()
        x = rows_of(max(ROWS), k, dtype)
        expected = x.double() @ dense.T + bias
        scale = expected.abs() + dense.abs().mean() * k**0.5
        with torch.inference_mode():
            whole = layer(x)
            assert ((whole.double() - expected).abs() / scale).max() < BOUNDS[dtype]
            for m in ROWS:
                assert torch.equal(layer(x[:m]), whole[:m])


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_tensors_come_back_to_the_last_bit(kernels: NativeKernels, form: WeightForm) -> None:
    layer = random_layer(form, 48, 320, torch.float32)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    places = {name: buffer.data_ptr() for name, buffer in layer.named_buffers()}
    assert layer.use(PanelProducts(kernels))
    assert {name: buffer.data_ptr() for name, buffer in layer.named_buffers()} == places
    assert not torch.equal(layer.codes, before["codes"])
    for name, tensor in before.items():
        assert torch.equal(getattr(layer.quantized, name), tensor)
    x = torch.randn(2, 320, dtype=torch.float64)
    expected = x @ layer.quantized.dequantize().double().T
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)  # the reference's: no kernel has float64


def test_threads_change_nothing(kernels: NativeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("int4", "q6_k"):
        layer = arranged(kernels, FORMS[name], 320, 1120, torch.bfloat16)
        x = rows_of(130, 1120, torch.bfloat16)
        found = []
        for threads in (1, 2, 5):
            monkeypatch.setattr(kernels, "num_threads", lambda count=threads: count)
            with torch.inference_mode():
                found.append((layer(x), layer(x[:1])))
        assert all(torch.equal(a, b) for one in found[1:] for a, b in zip(one, found[0], strict=True))


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_the_largest_sums_are_exact(kernels: NativeKernels, dtype: torch.dtype) -> None:
    """128 times the largest code times the largest whole number of x is below 2^31, and the signs may all be alike."""
    top = {torch.bfloat16: 255 / 128, torch.float16: 2047 / 1024, torch.float32: 2 - 2.0**-23}[dtype]
    for codes, offset, value in ((255, 0, 255), (0, 128, -128), (255, 128, 127)):
        layer = QuantLinear(WeightForm(8, 128, offset=offset, scale="float32"), 256, 16, dtype=dtype)
        layer.codes.fill_(codes)
        layer.scale.fill_(2.0**-15)
        assert layer.use(PanelProducts(kernels))
        for sign in (1, -1):
            x = torch.full((3, 256), sign * top, dtype=dtype)
            with torch.inference_mode():
                torch.testing.assert_close(
                    layer(x), (x.double().sum(1, keepdim=True) * value * 2.0**-15).expand(3, 16).to(dtype)
                )


def test_numbers_of_any_size(kernels: NativeKernels) -> None:
    """Powers of two of x and of its rows' sizes stay apart; what is not finite makes its own row NaN."""
    layer = arranged(kernels, FORMS["int8"], 16, 256, torch.bfloat16)
    dense = layer.quantized.dequantize().double()
    x = rows_of(4, 256, torch.bfloat16) * torch.tensor([2.0**80, 2.0**-80, 1.0, 0.0])[:, None].bfloat16()
    with torch.inference_mode():
        assert torch.allclose(layer(x).double(), x.double() @ dense.T + layer.bias.double(), rtol=0.02)  # type: ignore[union-attr]
        x[2, 77] = torch.inf
        got = layer(x)
    assert got[2].isnan().all() and got[[0, 1, 3]].isfinite().all()


def test_what_cannot_be_in_panels_keeps_its_order(kernels: NativeKernels) -> None:
    for form, n, k in (
        (FORMS["int4"], 40, 128), (FORMS["int4"], 48, 72), (WeightForm(8, 48, offset=128), 16, 96),
        (WeightForm(4, 64, scale="float32", codebook="nf4"), 16, 64),
        (WeightForm(8, 0, scale="float32", fp8="float8_e4m3fn"), 16, 64),
    ):  # fmt: skip
        assert not covers_panels(form, n, k)
        layer = random_layer(form, n, k, torch.float32)
        before = layer.codes.clone()
        assert use_kernels(nn.Sequential(layer), kernels) == 1
        assert torch.equal(layer.codes, before) and layer._kernel is not None and layer._kernel.name == "native"


def test_tensors_that_others_read_keep_their_order(kernels: NativeKernels) -> None:
    """A tied head has those of the embedding."""
    form = FORMS["q4_0"]
    head = random_layer(form, 32, 64, torch.float32)
    table = QuantEmbedding(form, 32, 64, dtype=torch.float32)
    table._buffers.update(head._buffers)
    before = head.codes.clone()
    other = random_layer(form, 32, 64, torch.float32)
    assert use_kernels(nn.ModuleList([table, head, other]), kernels) == 2
    assert torch.equal(table.codes, before)
    assert [layer._kernel.name for layer in (head, other) if layer._kernel] == ["native", "panels"]
    stored: QuantizedWeight = head.stored
    assert torch.equal(table(torch.arange(32)), stored.dequantize())


def test_layers_whose_weights_differ_in_form(kernels: NativeKernels) -> None:
    """Gate and up share x, but not how it becomes whole numbers; and one of the three is not in panels."""
    config = LlamaConfig(hidden_size=128, intermediate_size=256)
    for names in (("q4_k", "q6_k", "int8"), ("q4_0", "q4_0", "q5_0"), ("q8_0", "nf4", "q8_0")):
        mlp = LlamaMLP(config).bfloat16().requires_grad_(False)
        forms = {**FORMS, "nf4": WeightForm(4, 64, scale="float32", codebook="nf4")}
        for part, name in zip(("gate_proj", "up_proj", "down_proj"), names, strict=True):
            n, k = getattr(mlp, part).weight.shape
            setattr(mlp, part, random_layer(forms[name], n, k, torch.bfloat16))
        x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
        with torch.inference_mode():
            expected = mlp(x)
            use_kernels(mlp, kernels)
            separate = mlp(x)
            model = nn.Sequential(mlp)
            assert swap_layers(model, kernels) == 1
            torch.testing.assert_close(separate, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
            assert torch.equal(model(x), separate)


def test_weights_of_a_layer_that_moves(kernels: NativeKernels) -> None:
    layer = arranged(kernels, FORMS["q4_k"], 32, 256, torch.bfloat16)
    x = rows_of(3, 256, torch.bfloat16)
    with torch.inference_mode():
        before = layer(x)
        for buffer in layer.buffers():
            moved = buffer.clone()
            buffer.zero_()
            buffer.data = moved
        layer.tensors_moved()
        assert torch.equal(layer(x), before)
        assert not layer.use(NativeProducts(kernels)) or layer._kernel.name == "panels"  # type: ignore[union-attr]
