"""Attention and gated MLPs of a model, each handed over to one call into the kernels.

A module keeps its parameters, names and children; only its class changes, to a subclass whose `forward` calls the
kernel for what that covers and the original for everything else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from ctypes import addressof
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from core.execution.attention.interface import LayerAttention, bound_attention
from core.execution.attention.metadata import AttentionMetadata
from core.execution.native.kernels import NativeKernels
from core.execution.native.modules import NativeLinear, is_llama_norm
from core.execution.native.packed import linear_facts
from core.execution.native.recognize import same_forward
from core.execution.native.structs import DTYPES, AttentionLayer, StepView, Weights, weights_array

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP_PARTS = ("gate_proj", "up_proj", "down_proj")

# Which window a module with this code passes on; None where it leaves that to the config.
_ATTENTION: tuple[tuple[type[nn.Module], Callable[[Any], int | None] | None], ...] = (
    (LlamaAttention, None),
    (MistralAttention, lambda module: getattr(module.config, "sliding_window", None)),
    (Qwen2Attention, lambda module: module.sliding_window),
    (Qwen3Attention, lambda module: module.sliding_window),
)
_ACTIVATIONS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    F.silu,
    lambda x: F.gelu(x, approximate="tanh"),
)  # in the order of the numbers in layer.c


class NativeLayers:
    """The kernels, and the step that the layers of one stage share."""

    def __init__(self, kernels: NativeKernels) -> None:
        self.kernels = kernels
        self._metadata: AttentionMetadata | None = None
        self._step: StepView | None = None

    def step(self, metadata: AttentionMetadata) -> StepView:
        """The C side's view of `metadata`; made once per step."""
        if self._step is None or self._metadata is not metadata:
            tables = metadata.block_tables
            self._step = StepView(
                metadata.slot_mapping.shape[0], tables.shape[0], tables.shape[1], tables.data_ptr(),
                metadata.query_start.data_ptr(), metadata.seq_lens.data_ptr(), metadata.slot_mapping.data_ptr(),
            )  # fmt: skip
            self._metadata = metadata
        return self._step


class _Attention:
    """Mixed into an attention class. `[1, T, hidden]` in and out."""

    _native: NativeLayers
    _window: Callable[[Any], int | None] | None
    _normed: bool
    _prepared: tuple[LayerAttention, AttentionLayer | None] | None

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: Any = None, attention_mask: Any = None,
        past_key_values: Any = None, **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        bound = bound_attention(self)
        if bound is not None and past_key_values is None and not torch.is_grad_enabled():
            metadata, layer = bound.ready(), self._layer(bound)
            most = self._native.kernels.max_rows.get(hidden_states.dtype, 0)
            if metadata and layer and _covers(layer, hidden_states, position_embeddings, metadata, most):
                return self._run(layer, metadata, hidden_states, *position_embeddings), None
        return super().forward(  # type: ignore[misc, no-any-return]
            hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask,
            past_key_values=past_key_values, **kwargs,
        )  # fmt: skip

    def _layer(self, bound: LayerAttention) -> AttentionLayer | None:
        """The C side's view; made when the module is first called with these pages."""
        if self._prepared is None or self._prepared[0] is not bound:
            self._prepared = (bound, _prepare(self, bound))
        return self._prepared[1]

    def tensors_moved(self) -> None:
        """The parameters have other addresses than when they were looked up."""
        self._prepared = None

    def _run(
        self, layer: AttentionLayer, metadata: AttentionMetadata, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        out = x.new_empty((1, x.shape[1], layer.o.n))
        self._native.kernels.attention_layer(
            addressof(layer), addressof(self._native.step(metadata)), x.data_ptr(), x.stride(1), cos.data_ptr(),
            sin.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        return out


def _covers(
    layer: AttentionLayer, x: torch.Tensor, position_embeddings: Any, metadata: AttentionMetadata, max_rows: int
) -> bool:
    if position_embeddings is None or len(position_embeddings) != 2:
        return False
    tokens = metadata.slot_mapping.shape[0]
    shape = (1, tokens, layer.dim)
    return (
        not metadata.sites and DTYPES.get(x.dtype) == layer.type
        and tokens <= max_rows and x.shape == (1, tokens, layer.q.k)
        and x.stride(2) == 1
        and all(t.dtype is x.dtype and t.shape == shape and t.is_contiguous() for t in position_embeddings)
    )  # fmt: skip


def _prepare(module: Any, bound: LayerAttention) -> AttentionLayer | None:
    """The C side's view of a module and its pages; None where they are not what the kernel works on."""
    projections = _facts(module, _PROJECTIONS)
    if projections is None:
        return None
    k_pages, v_pages = bound.k_pages, bound.v_pages
    kv_heads, dim = k_pages.shape[2:]
    q, k, v, o = projections
    fits = (
        k_pages.is_cpu and k_pages.dtype is v_pages.dtype and DTYPES.get(k_pages.dtype) == q.type
        and v_pages.shape == k_pages.shape and k_pages.stride(3) == v_pages.stride(3) == 1 and dim % 2 == 0
        and q.n == o.k and q.n % (dim * kv_heads) == 0 and k.n == v.n == kv_heads * dim
    )  # fmt: skip
    if not fits:
        return None
    norms = [getattr(module, name) for name in ("q_norm", "k_norm")] if module._normed else []
    if norms and (norms[0].variance_epsilon != norms[1].variance_epsilon or norms[0].weight.shape != (dim,)):
        return None
    window = bound.window if module._window is None else module._window(module)
    strides = [pages.stride()[:3] for pages in (k_pages, v_pages)]
    return AttentionLayer(
        DTYPES[k_pages.dtype], q.n // dim, kv_heads, dim, k_pages.shape[1], window or 0, *strides,
        k_pages.data_ptr(), v_pages.data_ptr(), 0, *([n.weight.data_ptr() for n in norms] or (0, 0)), q, k, v, o,
        module.scaling, 0.0, norms[0].variance_epsilon if norms else 0.0,
    )  # fmt: skip


class _GatedMLP:
    """Mixed into an MLP class: `down(act(gate(x)) * up(x))`, `[..., hidden]` in and out."""

    _native: NativeLayers
    _activation: int

    def tensors_moved(self) -> None:
        """The parameters have other addresses than when they were looked up."""
        self._weights: Any = weights_array(_facts(self, _MLP_PARTS) or ())
        self._first: Weights = self._weights[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self._first
        shape = x.shape
        if (
            DTYPES.get(x.dtype) == first.type and shape[-1] == first.k and x.is_cpu and x.is_contiguous()
            and 0 < x.numel() <= self._native.kernels.max_rows[x.dtype] * first.k and not torch.is_grad_enabled()
        ):  # fmt: skip
            out = x.new_empty((*shape[:-1], self._weights[2].n))
            rows = x.numel() // first.k
            self._native.kernels.gated_mlp(
                addressof(self._weights), self._activation, rows, x.data_ptr(), first.k, out.data_ptr()
            )
            return out
        return super().forward(x)  # type: ignore[misc, no-any-return]


@functools.cache
def _subclass(mixin: type, base: type) -> type:
    return type(f"Native{base.__name__}", (mixin, base), {"__module__": base.__module__})


def _facts(module: object, names: tuple[str, ...]) -> list[Weights] | None:
    """What the kernels have to know of a module's linear layers; None if they do not cover all of them."""
    facts = [linear_facts(getattr(module, name, None)) for name in names]
    found = [each for each in facts if each is not None]
    return found if len(found) == len(names) else None


def _become(module: nn.Module, mixin: type, **attributes: Any) -> None:
    kind: Any = type(module)
    module.__class__ = _subclass(mixin, kind)
    for name, value in attributes.items():
        object.__setattr__(module, name, value)


def _adopt_attention(module: nn.Module, native: NativeLayers) -> bool:
    if _facts(module, _PROJECTIONS) is None:
        return False
    for reference, window in _ATTENTION:
        if same_forward(module, reference, "apply_rotary_pos_emb", "rotate_half"):
            normed = reference is Qwen3Attention
            if normed and not all(is_llama_norm(getattr(module, name)) for name in ("q_norm", "k_norm")):
                return False
            _become(module, _Attention, _native=native, _window=window, _normed=normed, _prepared=None)
            return True
    return False


def _adopt_mlp(module: nn.Module, native: NativeLayers) -> bool:
    if _facts(module, _MLP_PARTS) is None or not same_forward(module, LlamaMLP):
        return False
    grid = torch.linspace(-8, 8, 257)
    result = module.act_fn(grid)  # type: ignore[operator]
    for number, activation in enumerate(_ACTIVATIONS):
        if torch.equal(result, activation(grid)):
            _become(module, _GatedMLP, _native=native, _activation=number)
            module.tensors_moved()  # type: ignore[operator]
            return True
    return False


def swap_layers(model: nn.Module, kernels: NativeKernels) -> int:
    """Hand every attention and MLP module that the kernels know over to them. Returns how many there were.

    Comes after `swap_linears`, `pack_linears` and `swap_norms`. Weights keep their memory from then on; whoever
    moves it calls the modules' `tensors_moved`.
    """
    native = NativeLayers(kernels)
    return sum(_adopt_attention(module, native) or _adopt_mlp(module, native) for module in list(model.modules()))


def rehome(module: nn.Module, native: NativeLayers) -> None:
    """A module that is a twin of one that the kernels were given, over the same tensors, from now on uses these
    kernels and this step. Its children come first."""
    for name in ("kernels", "_kernels"):
        if isinstance(vars(module).get(name), NativeKernels):
            setattr(module, name, native.kernels)
    if "_native" in vars(module):
        object.__setattr__(module, "_native", native)
    if isinstance(module, NativeLinear):
        module._prepared = None
    if hasattr(module, "tensors_moved"):
        module.tensors_moved()  # type: ignore[operator]
