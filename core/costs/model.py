"""What a model is to placement: the bytes of its parts, and the memory that its largest step takes. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core.costs.plan import Experts, LayerCosts

ALLOCATOR_MARGIN = 1.1
"""By how much more than its tensors a step may take: allocators round sizes up and leave gaps between them."""


@dataclass(frozen=True, slots=True)
class ModelBytes:
    """Weight bytes in the serving dtype: before the layers, each layer, after them. With tied embeddings `head` is
    what a last stage that is not also the first needs beside `after`. What packing takes is counted in. `experts` says
    what of `layers` tokens share.
    """

    embedding: int
    layers: tuple[int, ...]
    after: int
    head: int
    tied: bool
    num_parameters: int
    layer_parameters: tuple[int, ...]
    head_parameters: int
    experts: Experts | None = None

    @property
    def total(self) -> int:
        """Of all parts, a head that is tied only once."""
        return self.embedding + sum(self.layers) + self.after + (0 if self.tied else self.head)

    def read_bytes(self, layer: int, tokens: int) -> float:
        """Of a layer, the bytes of the weights that `tokens` tokens take part in."""
        return self.layers[layer] - (self.experts.unread_bytes(layer, tokens) if self.experts else 0.0)


@dataclass(frozen=True, slots=True)
class Workspace:
    """Bytes of a stage's largest step, and what the last stage needs on top for logits and sampling."""

    layers_bytes: int
    head_bytes: int


def costs_of(
    weights: ModelBytes, workspace: Workspace, kv_bytes_per_token: Sequence[int], hidden_size: int, element_bytes: int,
    attention_bytes: int = 0,
) -> LayerCosts:  # fmt: skip
    """Bytes and operations per part. `attention_bytes` is what attention takes beside the workspace; a number of the
    serving dtype takes `element_bytes`."""
    return LayerCosts(
        embedding_bytes=weights.embedding,
        layer_bytes=weights.layers,
        after_bytes=weights.after,
        head_bytes=weights.head,
        tied=weights.tied,
        kv_bytes_per_token=tuple(kv_bytes_per_token),
        workspace_bytes=workspace.layers_bytes + attention_bytes,
        head_workspace_bytes=workspace.head_bytes,
        layer_flops=tuple(
            int(2 * (count - (weights.layers[layer] - weights.read_bytes(layer, 1)) / element_bytes))
            for layer, count in enumerate(weights.layer_parameters)
        ),
        head_flops=2 * weights.head_parameters,
        hidden_bytes=hidden_size * element_bytes,
        experts=weights.experts,
    )
