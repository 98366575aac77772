"""Reading safetensors checkpoints: which file holds which tensor, and tensors that are read when they are asked for."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from core.errors import CheckpointError, UnsupportedModelError

INDEX = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")

ElementBytes = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

_SAMPLES, _SAMPLE_BYTES = 16, 4096


def weights_digest(directory: Path) -> str:
    """Tells checkpoints in one place apart: configuration, sizes, headers and samples of the weights. Training changes
    nearly every weight, so a few say enough; reading all would take as long as loading."""
    digest = hashlib.blake2b(digest_size=16)
    for file in (directory / "config.json", *sorted(directory.glob("*.safetensors"))):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as content:
            for sample in range(_SAMPLES):
                content.seek(sample * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(content.read(_SAMPLE_BYTES))
    return digest.hexdigest()


class LazyTensor:
    """A tensor on disk with the part of the slicing interface that transformers' loader uses.

    `lazy[...]` reads it; `on_read` is told the bytes.
    """

    def __init__(self, file: Any, name: str, on_read: Callable[[int], None]) -> None:
        self._slice = file.get_slice(name)
        self._on_read = on_read
        self.nbytes = math.prod(self.get_shape()) * ElementBytes.get(self.get_dtype(), 1)

    def get_shape(self) -> list[int]:
        return list(self._slice.get_shape())

    def get_dtype(self) -> str:
        return str(self._slice.get_dtype())

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.get_shape())

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor: torch.Tensor = self._slice[index]
        self._on_read(tensor.nbytes)
        return tensor


class Checkpoint(ExitStack):
    """The safetensors files of a model directory. A context manager: files are open inside it.

    Raises `CheckpointError` for missing or damaged files, `UnsupportedModelError` where there are pickled weights only.
    """

    def __init__(self, path: Path, on_read: Callable[[int], None] = lambda nbytes: None) -> None:
        super().__init__()
        self.files = _find_files(path)
        self._on_read = on_read

    @property
    def total_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def tensors(self) -> dict[str, LazyTensor]:
        """All tensors by name, none read yet. Plain reads, not a memory map: a map would count, page by page, as
        resident memory of the process beside the tensors themselves.
        """
        found: dict[str, LazyTensor] = {}
        for file in self.files:
            try:
                handle = self.enter_context(safe_open(str(file), framework="pt", device="cpu", backend="pread"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file.name} is damaged or not a safetensors file: {error}") from error
            found.update((name, LazyTensor(handle, name, self._on_read)) for name in handle.keys())  # noqa: SIM118  not a dictionary
        return found


def _find_files(path: Path) -> list[Path]:
    index = path / INDEX
    if index.is_file():
        return _indexed_files(path, index)
    files = sorted(path.glob("*.safetensors"))
    if files:
        return files
    pickled = sorted(file.name for pattern in _PICKLED for file in path.glob(pattern))
    if pickled:
        raise UnsupportedModelError(
            f"{path.name} has pickled weights only ({pickled[0]}); convert them to safetensors first."
        )
    raise CheckpointError(f"{path} has no *.safetensors file.")


def _indexed_files(path: Path, index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index.name} of {path.name} cannot be read: {error}") from error
    files = [path / name for name in names]
    for file in files:
        if Path(file.name) != file.relative_to(path) or not file.is_file():
            raise CheckpointError(f"{path.name} lacks {file.name}, which {index.name} names.")
    return files
