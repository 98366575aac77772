"""The tensors behind the blocks: one stage's pages of K and V.

Layout, per layer: `[num_blocks, block_size, num_kv_heads, head_dim]`, so that a token's slot is a row of the flattened
first two dimensions (`slot = block * block_size + offset`) and a page is contiguous::

    block 0 | slot 0: head 0 .. head H-1 | slot 1: ... |
    block 1 | slot bs: ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from core.devices import DeviceBudget
from core.models.architecture import KVShape


class PagedKVCache:
    """Pages of the layers of one stage, on one device. The bytes are reserved in the device's budget first."""

    PURPOSE = "kv_cache"

    def __init__(
        self,
        shapes: Mapping[int, KVShape],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        budget: DeviceBudget,
    ) -> None:
        element_bytes = torch.empty((), dtype=dtype).element_size()
        per_token = sum(shape.bytes_per_token(element_bytes) for shape in shapes.values())
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.nbytes = per_token * num_blocks * block_size
        self._budget = budget
        budget.reserve(self.PURPOSE, self.nbytes)
        self._keys = {layer: self._pages(shape, shape.key_dim, dtype, device) for layer, shape in shapes.items()}
        self._values = {layer: self._pages(shape, shape.value_dim, dtype, device) for layer, shape in shapes.items()}

    def _pages(self, shape: KVShape, dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        size = (self.num_blocks, self.block_size, shape.num_kv_heads, dim)
        return torch.zeros(size, dtype=dtype, device=device)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V pages of a layer, `[num_blocks, block_size, num_kv_heads, head_dim]` each."""
        return self._keys[index], self._values[index]

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, `(source, target)`, in order: a target may be the source of the next."""
        for source, target in copies:
            for pages in (*self._keys.values(), *self._values.values()):
                pages[target].copy_(pages[source])

    def free(self) -> None:
        """Give the tensors and their reservation back."""
        self._keys.clear()
        self._values.clear()
        self._budget.release(self.PURPOSE, self.nbytes)
        self.nbytes = 0
