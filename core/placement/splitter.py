"""The `vram` strategy: layers by free memory, in the order of the devices.

The largest number of KV tokens is sought for which the layers still fit when each device in turn takes as many as it
can. At that number the devices are full, so that 24 GiB beside 16 GiB hold layers and KV in that proportion.
"""

from __future__ import annotations

from collections.abc import Sequence

from core.costs.plan import LayerCosts, PlacementPlan, StagePlan
from core.errors import InsufficientMemoryError


def split_by_memory(
    costs: LayerCosts,
    limits: Sequence[tuple[str, int]],
    *,
    model_name: str,
    min_kv_tokens: int,
    max_kv_tokens: int,
    block_size: int = 1,
) -> PlacementPlan:
    """Cut the model over devices given as `(name, free bytes)`.

    The cuts follow from the devices' memory alone; `max_kv_tokens` then bounds how much KV is really allocated. KV
    is counted in whole blocks. Raises `InsufficientMemoryError`, saying what each device lacks, if `min_kv_tokens`
    do not fit.
    """
    used, unused = list(limits[: costs.num_layers]), limits[costs.num_layers :]
    sizes = [limit for _, limit in used]
    low, high = -(-min_kv_tokens // block_size), _upper_bound(costs, sizes) // block_size
    cuts = _fill(costs, sizes, low * block_size)
    if cuts is None:
        raise _insufficient(costs, used, low * block_size)
    while low < high:
        middle = (low + high + 1) // 2
        attempt = _fill(costs, sizes, middle * block_size)
        if attempt is None:
            high = middle - 1
        else:
            low, cuts = middle, attempt
    kv_tokens = min(low, -(-max_kv_tokens // block_size)) * block_size
    stages = tuple(
        StagePlan(
            device_name=name,
            device_index=index,
            first_layer=first,
            last_layer=last,
            weight_bytes=costs.weight_bytes(first, last),
            kv_bytes_per_token=costs.stage_kv_bytes_per_token(first, last),
            kv_bytes=costs.stage_kv_bytes_per_token(first, last) * kv_tokens,
            workspace_bytes=costs.stage_workspace_bytes(last),
            limit_bytes=limit,
        )
        for index, ((name, limit), (first, last)) in enumerate(zip(used, cuts, strict=True))
    )
    return PlacementPlan(model_name, "vram", stages, kv_tokens, tuple(name for name, _ in unused))


def _upper_bound(costs: LayerCosts, sizes: Sequence[int]) -> int:
    """No more KV tokens than this can fit, whatever the cuts."""
    per_token = max(1, sum(costs.kv_bytes_per_token))
    return max(0, sum(sizes) // per_token)


def _fill(costs: LayerCosts, sizes: Sequence[int], kv_tokens: int) -> list[tuple[int, int]] | None:
    """Give each device in turn as many layers as fit, leaving at least one for each that follows."""
    cuts, first = [], 0
    for index, size in enumerate(sizes):
        most = costs.num_layers - (len(sizes) - index - 1)
        last = most if index == len(sizes) - 1 else first
        if index < len(sizes) - 1:
            while last < most and costs.needed_bytes(first, last + 1, kv_tokens) <= size:
                last += 1
        if last == first or costs.needed_bytes(first, last, kv_tokens) > size:
            return None
        cuts.append((first, last))
        first = last
    return cuts


def _insufficient(costs: LayerCosts, used: Sequence[tuple[str, int]], kv_tokens: int) -> InsufficientMemoryError:
    """What each device lacks for the split in proportion to memory."""
    total, first, lacking = max(1, sum(limit for _, limit in used)), 0, {}
    for index, (name, limit) in enumerate(used):
        following = len(used) - index - 1
        share = round(costs.num_layers * sum(size for _, size in used[: index + 1]) / total)
        last = costs.num_layers if following == 0 else max(first + 1, min(share, costs.num_layers - following))
        lacking[name] = max(0, costs.needed_bytes(first, last, kv_tokens) - limit)
        first = last
    needed = costs.needed_bytes(0, costs.num_layers, kv_tokens)
    listed = ", ".join(f"{name} lacks {count} bytes" for name, count in lacking.items() if count)
    return InsufficientMemoryError(
        f"The model needs about {needed} bytes with a KV cache of {kv_tokens} tokens, and the devices have {total}"
        + (f": {listed}." if listed else "."),
        lacking_bytes=lacking,
    )
