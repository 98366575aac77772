"""The tensors of a GGUF checkpoint, by the names that the model's modules have, read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from core.errors import CheckpointError
from core.models.gguf.header import GgufTensor, read_header
from core.models.gguf.metadata import Metadata
from core.models.gguf.names import Place, placing

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class LazyGgufTensor:
    """Like `LazyTensor`. What is quantized comes as rows of blocks, uint8 `[n, row_bytes]`; its shape and dtype are
    those of what they mean."""

    def __init__(self, tensor: GgufTensor, place: Place, on_read: Callable[[int], None]) -> None:
        self.file = tensor.file.name
        self.nbytes = tensor.nbytes
        self._tensor, self._place, self._on_read = tensor, place, on_read

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return self._tensor.kind

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self._tensor.shape)

    def peek(self, first: int, last: int) -> torch.Tensor:
        """Rows `first .. last - 1`, which do not count as read."""
        return self._read()[first:last]

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = self._read()
        self._on_read(self.nbytes)
        return tensor[index]

    def _read(self) -> torch.Tensor:
        raw = bytearray(self.nbytes)
        with self._tensor.file.open("rb") as file:
            file.seek(self._tensor.offset)
            if file.readinto(raw) != self.nbytes:
                raise CheckpointError(f"{self.file} is shorter than it was.", param="model")
        flat = torch.frombuffer(raw, dtype=torch.uint8)
        plain = _PLAIN.get(self._tensor.kind)
        shape = self._tensor.shape
        values = flat.view(plain).view(shape) if plain is not None else flat.view(*shape[:-1], -1)
        return self._place.apply(values)


def gguf_tensors(files: tuple[Path, ...], on_read: Callable[[int], None]) -> dict[str, LazyGgufTensor]:
    """All tensors of a model, by the names of its modules. Raises `UnsupportedModelError` for an architecture or a
    tensor that is not known."""
    header = read_header(files)
    data = Metadata(header)
    heads = data.count("attention.head_count")
    place_of = placing(header.architecture, heads, data.count("attention.head_count_kv", heads))
    found = {}
    for gguf_name, tensor in header.tensors.items():
        place = place_of(gguf_name)
        if place is not None:
            found[place.name] = LazyGgufTensor(tensor, place, on_read)
    return found
