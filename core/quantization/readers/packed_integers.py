"""What readers of integer formats share: bits in words, groups, and the columns that an act-order leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from core.errors import CheckpointError, UnsupportedModelError
from core.quantization.reader import Stored

SCALES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


def unpack_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Numbers of `bits` bits in the int32 words of each row, lowest first; a number may begin in one word and end in
    the next. `[r, w]` to uint8 `[r, count]`. Raises `CheckpointError` if a row has too few."""
    if words.shape[1] * 32 < bits * count:
        raise CheckpointError(f"{words.shape[1]} words do not hold {count} numbers of {bits} bits.", param="model")
    data = words.contiguous().view(torch.uint8)
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        return ((data[..., None] >> shifts) & ((1 << bits) - 1)).flatten(1)[:, :count].contiguous()
    starts = torch.arange(count) * bits
    first, rest = starts // 8, (starts % 8).to(torch.int32)
    wide = torch.cat((data, data.new_zeros(len(data), 1)), dim=1).to(torch.int32)
    both = wide[:, first] | (wide[:, first + 1] << 8)
    return ((both >> rest) & ((1 << bits) - 1)).to(torch.uint8)


def scale_dtype(tensor: Stored | None, default: str) -> str:
    """By name, of a tensor in the files, or of one that is not there yet. Raises `UnsupportedModelError`."""
    if tensor is None:
        return default
    dtype = tensor.get_dtype()
    if dtype not in SCALES:
        raise UnsupportedModelError(f"Scales of {dtype} are not supported.", param="model")
    return SCALES[dtype]


def order_of(groups: torch.Tensor, group: int) -> torch.Tensor:
    """Columns in the order of their groups, int32 `[k]`; `groups` has the number of each column's group. Raises
    `CheckpointError` if a group has more or fewer columns than it should."""
    count = math.ceil(len(groups) / group)
    sizes = torch.bincount(groups.long().clamp_min(0), minlength=count)
    if len(sizes) != count or bool((sizes[:-1] != group).any()) or bool((groups < 0).any()):
        raise CheckpointError(f"g_idx does not give every group {group} columns.", param="model")
    return torch.argsort(groups, stable=True).to(torch.int32)


def in_groups(groups: torch.Tensor, group: int) -> bool:
    """Whether columns are in the order of their groups."""
    return bool((groups.long() == torch.arange(len(groups)) // group).all())


def whole(settings: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A whole number of a config. Raises `CheckpointError`."""
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(f"config.json: {name} of quantization_config is {value!r}, but must be an integer.")
    return value


def modules_with(stored: Mapping[str, Stored], ending: str) -> frozenset[str]:
    """The modules that have a tensor of this name."""
    return frozenset(name.removesuffix(f".{ending}") for name in stored if name.endswith(f".{ending}"))


def is_listed(name: str, patterns: Any) -> bool:
    """Whether a list of a config names a module, or a part of its name."""
    listed = patterns if isinstance(patterns, list) else []
    return any(isinstance(each, str) and (each == name or f".{each}." in f".{name}.") for each in listed)
