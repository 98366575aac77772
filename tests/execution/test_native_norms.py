"""RMS norms in the kernels: the right modules are taken over, with the same numbers."""

from __future__ import annotations

import pytest
import torch
from execution.kernel_variants import VARIANTS, load_variant
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from core.execution.native import NativeKernels, NativeRMSNorm, swap_norms
from core.execution.native.modules import is_llama_norm


@pytest.fixture(scope="module", params=VARIANTS)
def kernels(request: pytest.FixtureRequest) -> NativeKernels:
    return load_variant(request.param)


def test_only_norms_of_llamas_kind_are_taken() -> None:
    assert is_llama_norm(LlamaRMSNorm(8))
    assert is_llama_norm(Qwen3RMSNorm(8))
    assert not is_llama_norm(Gemma2RMSNorm(8)), "Gemma adds one to the weight"
    assert not is_llama_norm(nn.LayerNorm(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_numbers_are_those_of_the_module(kernels: NativeKernels, dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(96).to(dtype)
    norm.weight.data.normal_()
    model = nn.ModuleDict({"norm": norm, "other": nn.LayerNorm(96)})
    x = torch.randn(1, 7, 96).to(dtype)
    expected = norm(x)
    assert swap_norms(model, kernels) == 1
    swapped = model["norm"]
    assert isinstance(swapped, NativeRMSNorm)
    assert swapped.weight is norm.weight
    with torch.inference_mode():
        torch.testing.assert_close(swapped(x), expected)
