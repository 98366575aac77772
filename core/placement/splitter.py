"""The `vram` strategy: layers by free memory, in the order of the devices.

The largest number of KV tokens is sought for which the layers still fit when each device in turn takes as many as it
can. At that number the devices are full, so that 24 GiB beside 16 GiB hold layers and KV in that proportion.
"""

from __future__ import annotations

from collections.abc import Sequence

from core.costs.plan import LayerCosts, PlacementDevice, PlacementProblem
from core.devices.device import format_bytes
from core.errors import InsufficientMemoryError
from core.placement.programme import Cut
from core.placement.search import lacking_memory, largest


def cuts_by_memory(request: PlacementProblem) -> list[Cut]:
    """Cut the model over the devices.

    The cuts follow from the devices' memory alone, whatever the most KV that is wanted. Raises
    `InsufficientMemoryError`, saying what each device lacks, if `min_kv_tokens` do not fit.
    """
    costs, block = request.costs, request.block_size
    used = request.devices[: costs.num_layers]
    sizes = [device.limit_bytes for device in used]
    least = request.least_kv_tokens
    if not _fill(costs, sizes, least):
        raise _insufficient(costs, used, least)
    bound = sum(sizes) // max(1, sum(costs.kv_bytes_per_token))  # no more tokens can fit, whatever the cuts
    most = largest(lambda blocks: bool(_fill(costs, sizes, blocks * block)), least // block, bound // block)
    return _fill(costs, sizes, most * block)


def _fill(costs: LayerCosts, sizes: Sequence[int], kv_tokens: int) -> list[Cut]:
    """Give each device in turn as many layers as fit, leaving at least one for each that follows; empty if they do not
    fit."""
    cuts: list[Cut] = []
    first = 0
    for index, size in enumerate(sizes):
        most = costs.num_layers - (len(sizes) - index - 1)
        last = most if index == len(sizes) - 1 else first
        while last < most and costs.needed_bytes(first, last + 1, kv_tokens) <= size:
            last += 1
        if last == first or costs.needed_bytes(first, last, kv_tokens) > size:
            return []
        cuts.append(Cut(index, first, last))
        first = last
    return cuts


def _insufficient(costs: LayerCosts, used: Sequence[PlacementDevice], kv_tokens: int) -> InsufficientMemoryError:
    """What each device lacks for the split in proportion to memory."""
    total, first, needs = max(1, sum(device.limit_bytes for device in used)), 0, {}
    for index, device in enumerate(used):
        following = len(used) - index - 1
        share = round(costs.num_layers * sum(other.limit_bytes for other in used[: index + 1]) / total)
        last = costs.num_layers if following == 0 else max(first + 1, min(share, costs.num_layers - following))
        needs[device.name] = (costs.needed_bytes(first, last, kv_tokens), device.limit_bytes)
        first = last
    needed = costs.needed_bytes(0, costs.num_layers, kv_tokens)
    return lacking_memory(
        f"The model needs about {format_bytes(needed)} with a KV cache of {kv_tokens} tokens, and the devices have "
        f"{format_bytes(total)}",
        needs,
    )
