"""The tensors behind the blocks: one stage's pages of K and V, on its own device and on those that lend it memory.

Layout, per region and layer: `[num_pages, block_size, num_kv_heads, head_dim]`, so that a token's slot is a row of the
flattened first two dimensions (`slot = page * block_size + offset`) and a page is contiguous::

    page 0 | slot 0: head 0 .. head H-1 | slot 1: ... |
    page 1 | slot bs: ...

A region is one allocation, so that what lends it gets it back whole: the K pages of the first layer, then its V pages,
then the next layer's.

Pages that leave a region travel as bytes, page-first: for each layer in order the K page, then the V page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from core.devices import Device, DeviceBudget, format_bytes
from core.devices.exhaustion import is_out_of_memory
from core.errors import OutOfDeviceMemoryError
from core.kv_cache.page_ops import LOCAL
from core.models.architecture import KVShape

Pages = tuple[torch.Tensor, torch.Tensor]


class FarPages(Protocol):
    """Pages on a device of another machine. All may raise `DeviceLostError`."""

    @property
    def device(self) -> Device:
        """Where what is packed is, and what is unpacked has to be: main memory here, by the other device's name."""

    def pack(self, region_id: int, pages: Sequence[int], layers: Sequence[int]) -> torch.Tensor: ...

    def unpack(self, region_id: int, pages: Sequence[int], data: torch.Tensor, layers: Sequence[int]) -> None: ...


@dataclass(frozen=True, slots=True)
class PageRegion:
    """Pages in one place: K and V by layer, and the device and ledger they are on; or, if they are `far`, on another
    machine, neither tensors nor a ledger."""

    device: Device
    budget: DeviceBudget | None
    num_pages: int
    layers: Mapping[int, Pages]
    far: FarPages | None = None


class PagedKVCache:
    """Pages of the layers of one stage. Bytes are reserved in a device's budget before they are allocated.

    Regions come and go in the engine thread, between steps that use them; pages are read and written by the stage's.
    """

    PURPOSE = "kv_cache"
    LENT = "lent"

    def __init__(
        self,
        shapes: Mapping[int, KVShape],
        num_pages: int,
        block_size: int,
        dtype: torch.dtype,
        device: Device,
        budget: DeviceBudget,
        *,
        scratch: bool = False,
    ) -> None:
        """With `scratch`, local pages have one more behind them, for rows that are nobody's; it is part of what a stage
        works in, and not of `nbytes`. `layer_bytes` is what each layer has of a page, in the order of packing."""
        self.block_size = block_size
        self.dtype = dtype
        self.layer_bytes = {
            index: block_size * shape.bytes_per_token(dtype.itemsize) for index, shape in shapes.items()
        }
        self.page_bytes = sum(self.layer_bytes.values())
        self._shapes = dict(shapes)
        self._regions: dict[int, PageRegion] = {}
        self.add_region(LOCAL, num_pages, device, budget, spare=int(scratch))

    @property
    def num_pages(self) -> int:
        """On the stage's own device."""
        return self._regions[LOCAL].num_pages

    @property
    def nbytes(self) -> int:
        """Bytes of the pages on the stage's own device."""
        return self.page_bytes * self.num_pages

    def add_region(
        self, region_id: int, num_pages: int, device: Device, budget: DeviceBudget, *, spare: int = 0
    ) -> None:
        """Allocate pages on a device. Raises `OutOfDeviceMemoryError`, with nothing kept, if it has no room."""
        nbytes, purpose = self.page_bytes * num_pages, self._purpose(region_id)
        budget.reserve(purpose, nbytes)
        try:
            layers = self._pages(num_pages + spare, device)
        except (RuntimeError, MemoryError) as error:
            budget.release(purpose, nbytes)
            if not is_out_of_memory(error):
                raise
            raise OutOfDeviceMemoryError(
                f"{device.name}: {format_bytes(nbytes)} of KV pages could not be had: {error}"
            ) from error
        self._regions[region_id] = PageRegion(device, budget, num_pages, layers)

    def _pages(self, num_pages: int, device: Device) -> dict[int, Pages]:
        """K and V of every layer as views of one tensor."""
        rows = num_pages * self.block_size
        dims = [
            (shape.num_kv_heads, dim) for shape in self._shapes.values() for dim in (shape.key_dim, shape.value_dim)
        ]
        sizes = [rows * heads * dim for heads, dim in dims]
        arena = torch.zeros(sum(sizes), dtype=self.dtype, device=device.torch_device)
        views = [
            part.view(num_pages, self.block_size, heads, dim)
            for part, (heads, dim) in zip(torch.split(arena, sizes), dims, strict=True)
        ]
        return dict(zip(self._shapes, zip(views[::2], views[1::2], strict=True), strict=True))

    def add_far_region(self, region_id: int, num_pages: int, far: FarPages) -> None:
        """Use pages of another machine, which are there."""
        self._regions[region_id] = PageRegion(far.device, None, num_pages, {}, far)

    def drop_region(self, region_id: int) -> None:
        """Give a region's memory back to the device that lent it, and what the allocator keeps of it to other
        programs. One on another machine is that machine's to give back."""
        region = self._regions.pop(region_id)
        if region.budget is None:
            return
        region.budget.release(self._purpose(region_id), self.page_bytes * region.num_pages)
        if region_id != LOCAL and region.device.is_gpu:
            del region
            torch.cuda.empty_cache()

    def _purpose(self, region_id: int) -> str:
        return self.PURPOSE if region_id == LOCAL else self.LENT

    @property
    def regions(self) -> Mapping[int, PageRegion]:
        """All that are there, as they are now."""
        return dict(self._regions)

    def region(self, region_id: int) -> PageRegion:
        return self._regions[region_id]

    def layer(self, index: int, region_id: int = LOCAL) -> Pages:
        """K and V pages of a layer, `[num_pages, block_size, num_kv_heads, head_dim]` each."""
        return self._regions[region_id].layers[index]

    def copy_within(self, region_id: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy pages inside a region. No page may be both source and target."""
        region = self._regions[region_id]
        if region.far is not None:
            region.far.unpack(region_id, targets, region.far.pack(region_id, sources, ()), ())
            return
        where = region.device.torch_device
        source, target = torch.tensor(sources, device=where), torch.tensor(targets, device=where)
        for pages in region.layers.values():
            for tensor in pages:
                tensor.index_copy_(0, target, tensor.index_select(0, source))

    def pack(self, region_id: int, pages: Sequence[int], layers: Sequence[int] = ()) -> torch.Tensor:
        """The pages' bytes, uint8 `[n, page_bytes]`, on the region's device; with `layers`, of those layers alone."""
        region = self._regions[region_id]
        if region.far is not None:
            return region.far.pack(region_id, pages, layers)
        index = torch.tensor(pages, device=region.device.torch_device)
        parts = [
            tensor.index_select(0, index).view(len(pages), -1)
            for layer in layers or region.layers
            for tensor in region.layers[layer]
        ]
        return torch.cat(parts, dim=1).view(torch.uint8)

    def unpack(self, region_id: int, pages: Sequence[int], data: torch.Tensor, layers: Sequence[int] = ()) -> None:
        """Write bytes made by `pack` into pages; with `layers`, those layers alone, and `data` holds no others."""
        region = self._regions[region_id]
        if region.far is not None:
            region.far.unpack(region_id, pages, data, layers)
            return
        index = torch.tensor(pages, device=region.device.torch_device)
        elements = data.view(self.dtype)
        first = 0
        for layer in layers or region.layers:
            for tensor in region.layers[layer]:
                width = tensor[0].numel()
                part = elements[:, first : first + width]
                tensor.index_copy_(0, index, part.reshape(len(pages), *tensor.shape[1:]))
                first += width

    def free(self) -> None:
        """Give all tensors and their reservations back."""
        for region_id in list(self._regions):
            self.drop_region(region_id)
