"""Joins transformers' attention interface to the pages: the function that every model's attention modules call.

A stage binds one `LayerAttention` to each of its attention modules at load; the step's metadata is set on the stage's
`AttentionContext` before the forward pass, which one thread at a time runs. No mask function is registered under the
name, so transformers builds no masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface

from core.errors import UnsupportedModelError
from core.execution.attention.merge import Part
from core.execution.attention.metadata import AttentionMetadata, AttentionSpec, SiteBatch
from core.execution.attention.triton_variants import AttentionKind, Heads

ATTENTION_NAME = "vramancer_paged"
_BOUND = "_vramancer_attention"

OnKernel = Callable[[int, int], None]
"""Told how many kernels are ready, of how many."""


class AttentionBackend(Protocol):
    """A way to write and read pages. Shapes as in `core.execution.attention.torch_paged`."""

    name: str

    def write(
        self, key: torch.Tensor, value: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> None: ...  # fmt: skip

    def attend(
        self, query: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> torch.Tensor: ...  # fmt: skip

    def attend_partial(
        self, query: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, site: SiteBatch, spec: AttentionSpec
    ) -> Part:
        """Attention over the keys of one site: `query` `[R, Hq, D]` to fp32 `[R, Hq, Dv]` and fp32 `[R, Hq]`.

        The second is the natural log of the sum of exponentials of the scores, scaled and capped, by which
        `core.execution.attention.merge` weighs the parts. A row that sees no key here gets 0 and -inf. `spec.sinks`
        play no part: they join once, at the merge.
        """

    def merge(self, parts: Sequence[Part], sinks: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """`core.execution.attention.merge.merge_partials`, the backend's way."""

    def warm_up(
        self, kinds: Iterable[AttentionKind], device: torch.device, *, partial: bool, on_kernel: OnKernel
    ) -> None:
        """Make ready all that layers of these kinds will ask for: `attend_partial` if `partial`, else `attend`."""


class Sites(Protocol):
    """Attention over pages of which some are on other devices (`core.execution.site_attention`)."""

    def attend(
        self, layer: int, query: torch.Tensor, metadata: AttentionMetadata, spec: AttentionSpec
    ) -> torch.Tensor: ...


class AttentionContext:
    """What a stage's attention modules share. `metadata` is set by the stage before each forward pass, and `wait_for`
    if pages are still being loaded: it returns once those of a layer are there."""

    def __init__(self, backend: AttentionBackend, sites: Sites | None = None) -> None:
        self.backend = backend
        self.sites = sites
        self.metadata: AttentionMetadata | None = None
        self.wait_for: Callable[[int], None] | None = None


class LayerAttention:
    """One layer's local pages and window, bound to its attention module."""

    def __init__(
        self, context: AttentionContext, index: int, k_pages: torch.Tensor, v_pages: torch.Tensor, window: int | None
    ) -> None:
        self.context = context
        self.index = index
        self.k_pages = k_pages
        self.v_pages = v_pages
        self.window = window

    def ready(self) -> AttentionMetadata | None:
        """The step's metadata, once this layer's pages are there; None outside a step."""
        if self.context.wait_for is not None:
            self.context.wait_for(self.index)
        return self.context.metadata

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: AttentionSpec
    ) -> torch.Tensor:
        """`query` `[1, Hq, T, D]`, `key`, `value` `[1, Hkv, T, D]` to `[1, T, Hq, Dv]`."""
        metadata, backend = self.ready(), self.context.backend
        if metadata is None:
            raise RuntimeError("attention is called outside a step")
        key, value = key[0].transpose(0, 1), value[0].transpose(0, 1)
        if key.shape[1:] != self.k_pages.shape[2:] or value.shape[1:] != self.v_pages.shape[2:]:
            raise UnsupportedModelError(
                f"the model's KV heads {tuple(key.shape[1:])}, {tuple(value.shape[1:])} are not the "
                f"{tuple(self.k_pages.shape[2:])}, {tuple(self.v_pages.shape[2:])} that its config announces."
            )
        backend.write(key, value, self.k_pages, self.v_pages, metadata)
        if metadata.sites and self.context.sites is not None:
            return self.context.sites.attend(self.index, query[0].transpose(0, 1), metadata, spec)[None]
        return backend.attend(query[0].transpose(0, 1), self.k_pages, self.v_pages, metadata, spec)[None]


def bind(model: nn.Module, layers: dict[int, LayerAttention]) -> None:
    """Give each attention module (they carry a `layer_idx`) its pages.

    Raises `UnsupportedModelError` if one has none.
    """
    bound = set()
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and index in layers:
            setattr(module, _BOUND, layers[index])
            bound.add(index)
    if bound != set(layers):
        raise UnsupportedModelError(
            f"{type(model).__name__} has layers without attention: {sorted(set(layers) - bound)}."
        )


def unbind(module: nn.Module) -> None:
    """Take away what `bind` gave a module."""
    vars(module).pop(_BOUND, None)


def attention_kinds(model: nn.Module, num_heads: int) -> frozenset[AttentionKind]:
    """How the layers that `bind` gave pages attend, as far as kernels differ; each with `num_heads` query heads."""
    kinds = set()
    for module in model.modules():
        layer = bound_attention(module)
        if layer is None:
            continue
        (_, block_size, kv_heads, key_dim), value_dim = layer.k_pages.shape, layer.v_pages.shape[3]
        heads = Heads(kv_heads, num_heads // kv_heads, key_dim, value_dim, layer.k_pages.dtype)
        sinks = getattr(module, "sinks", None)
        for window in {layer.window, getattr(module, "sliding_window", layer.window)}:
            kind = AttentionKind(
                heads,
                block_size,
                has_window=window is not None,
                has_softcap=bool(getattr(module, "attn_logit_softcapping", None)),
                sinks=None if sinks is None else sinks.dtype,
            )
            kinds.add(kind)
    return frozenset(kinds)


def bound_attention(module: object) -> LayerAttention | None:
    """What `bind` gave a module."""
    return getattr(module, _BOUND, None)


def _paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The registered function. A window passed by the model wins over the config's."""
    layer: LayerAttention = getattr(module, _BOUND)
    window = kwargs.get("sliding_window", layer.window)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return layer(query, key, value, AttentionSpec(scale, window, softcap or None, s_aux)), None


AttentionInterface.register(ATTENTION_NAME, _paged_attention)
