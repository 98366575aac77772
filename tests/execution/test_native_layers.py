"""Attention and MLP modules in the kernels: the right ones are taken over, with the same numbers."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from execution.kernel_variants import VARIANTS, load_variant
from paged_cases import CASES, Case, make
from torch import nn
from transformers import Gemma2Config, GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from core.execution.attention.interface import ATTENTION_NAME, AttentionContext, LayerAttention, bind
from core.execution.attention.metadata import AttentionMetadata
from core.execution.attention.native_paged import NativePagedAttention
from core.execution.native import NativeKernels, swap_layers, swap_linears

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS: dict[str, tuple[type[nn.Module], type[Any], dict[str, Any]]] = {
    "llama": (LlamaAttention, LlamaConfig, {}),
    "llama with biases": (LlamaAttention, LlamaConfig, {"attention_bias": True}),
    "mistral": (MistralAttention, MistralConfig, {"sliding_window": 6}),
    "qwen2": (Qwen2Attention, Qwen2Config, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    "qwen3": (Qwen3Attention, Qwen3Config, {}),
}


@pytest.fixture(scope="module", params=VARIANTS)
def kernels(request: pytest.FixtureRequest) -> NativeKernels:
    return load_variant(request.param)


def attention(kind: str, head_dim: int, dtype: torch.dtype) -> nn.Module:
    """A random attention module with four query heads and two KV heads."""
    module_class, config_class, extra = KINDS[kind]
    config = config_class(
        hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=head_dim, num_hidden_layers=1, **extra
    )
    if kind == "qwen2":  # takes its head size from the hidden size
        config.head_dim = head_dim
    config._attn_implementation = ATTENTION_NAME
    torch.manual_seed(3)
    module = module_class(config, 0)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.3)
    return module.to(dtype).eval()


def slots(metadata: AttentionMetadata, block_size: int) -> torch.Tensor:
    """Where each new token belongs by its sequence's block table."""
    starts = metadata.host_query_start
    rows = torch.repeat_interleave(torch.arange(len(starts) - 1), torch.tensor(starts).diff())
    at = positions(metadata)[0]
    return metadata.block_tables[rows, at // block_size].long() * block_size + at % block_size


class Bound:
    """A module bound to pages of its own."""

    def __init__(self, module: nn.Module, case: Case, kernels: NativeKernels) -> None:
        _, k_pages, v_pages, metadata, _ = make(case)
        self.metadata = replace(metadata, slot_mapping=slots(metadata, case.block_size))
        self.module, self.context = module, AttentionContext(NativePagedAttention(kernels))
        self.k_pages, self.v_pages = k_pages.clone(), v_pages.clone()
        bind(module, {0: LayerAttention(self.context, 0, self.k_pages, self.v_pages, None)})

    def __call__(self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        self.context.metadata = self.metadata
        with torch.inference_mode():
            result = self.module(x, position_embeddings=rotary, attention_mask=None)
        return result[0]  # type: ignore[no-any-return]


def positions(metadata: AttentionMetadata) -> torch.Tensor:
    starts, lengths = metadata.host_query_start, metadata.host_seq_lens
    parts = [torch.arange(n - (b - a), n) for a, b, n in zip(starts, starts[1:], lengths, strict=False)]
    return torch.cat(parts)[None]


def rotary(head_dim: int, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    config = LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim)
    cos, sin = LlamaRotaryEmbedding(config)(x, position_ids)
    return cos, sin


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 24], ids=["blocks", "elements"])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_gives_the_modules_own_numbers(
    kernels: NativeKernels, kind: str, head_dim: int, dtype: torch.dtype
) -> None:
    case = Case(CASES["mixed"].sequences, key_dim=head_dim, value_dim=head_dim, dtype=dtype)
    theirs = attention(kind, head_dim, dtype)
    ours = copy.deepcopy(theirs)
    for module in (theirs, ours):
        swap_linears(module, kernels)
    assert swap_layers(ours, kernels) == 1
    assert isinstance(ours, type(theirs))
    expected, actual = Bound(theirs, case, kernels), Bound(ours, case, kernels)
    x = torch.randn(1, expected.metadata.host_query_start[-1], 48).to(dtype)
    angles = rotary(head_dim, x, positions(expected.metadata))
    want, got = expected(x, angles), actual(x, angles)
    assert ours._prepared is not None  # type: ignore[truthy-bool]
    assert ours._prepared[1] is not None, "the kernel must have done it"  # type: ignore[index]
    torch.testing.assert_close(actual.k_pages, expected.k_pages)
    torch.testing.assert_close(actual.v_pages, expected.v_pages)
    torch.testing.assert_close(got, want)


def test_a_sequence_does_not_depend_on_its_neighbours(kernels: NativeKernels) -> None:
    module = attention("llama", 64, torch.bfloat16)
    swap_linears(module, kernels)
    assert swap_layers(module, kernels) == 1
    sizes = {"key_dim": 64, "value_dim": 64, "dtype": torch.bfloat16}
    x = torch.randn(1, 8, 48).to(torch.bfloat16)
    together = Bound(module, Case(((3, 3), (5, 5)), **sizes), kernels)  # type: ignore[arg-type]
    both = together(x, rotary(64, x, positions(together.metadata)))
    alone = Bound(module, Case(((3, 3),), **sizes), kernels)  # type: ignore[arg-type]
    first = alone(x[:, :3], rotary(64, x, positions(alone.metadata)))
    assert torch.equal(first, both[:, :3])


def test_attention_of_another_kind_is_left_alone(kernels: NativeKernels) -> None:
    config = Gemma2Config(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=1)
    module = Gemma2Attention(config, 0)
    swap_linears(module, kernels)
    assert swap_layers(module, kernels) == 0
    assert type(module) is Gemma2Attention


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 19])
@pytest.mark.parametrize(
    ("module_class", "config"),
    [
        (LlamaMLP, LlamaConfig(hidden_size=40, num_attention_heads=4, intermediate_size=72, mlp_bias=True)),
        (
            GemmaMLP,
            GemmaConfig(hidden_size=40, num_attention_heads=4, intermediate_size=72, hidden_act="gelu_pytorch_tanh"),
        ),
    ],
    ids=["silu", "gelu"],
)
def test_an_mlp_gives_the_modules_own_numbers(
    kernels: NativeKernels, module_class: type[nn.Module], config: Any, rows: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(5)
    theirs = module_class(config).to(dtype)
    ours = copy.deepcopy(theirs)
    for module in (theirs, ours):
        swap_linears(module, kernels)
    assert swap_layers(ours, kernels) == 1
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    x = (4 * torch.randn(1, rows, 40)).to(dtype)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x))
    assert ours(x).requires_grad, "with gradients on, the module's own code runs"


def test_an_unknown_activation_is_left_alone(kernels: NativeKernels) -> None:
    module = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=48, hidden_act="relu"))
    swap_linears(module, kernels)
    assert swap_layers(module, kernels) == 0


def test_a_copy_with_other_code_is_left_alone(kernels: NativeKernels) -> None:
    class Doubled(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)  # type: ignore[no-any-return]

    module = Doubled(LlamaConfig(hidden_size=32, intermediate_size=48))
    swap_linears(module, kernels)
    assert swap_layers(module, kernels) == 0
