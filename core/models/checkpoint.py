"""Reading safetensors checkpoints: which file holds which tensor, and tensors that are read when they are asked for."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from core.errors import CheckpointError, UnsupportedModelError
from core.logs import get_logger
from core.models.gguf.header import gguf_files, is_gguf
from core.models.gguf.tensors import LazyGgufTensor, gguf_tensors
from core.models.json_files import read_json_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")

ElementBytes = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1,
    "U8": 1, "BOOL": 1,
}  # fmt: skip

_SAMPLES, _SAMPLE_BYTES = 16, 4096

_DAMAGE = {
    "header too small": "it is shorter than a header",
    "header too large": "its header claims to be longer than any may be",
    "invalid header length": "its header claims to be longer than the file",
    "invalid utf-8 in header": "its header is not text",
    "in header": "its header does not list tensors with dtype, shape and offsets",
    "incomplete metadata": "its tensors do not fill it exactly; it may be cut off",
    "invalid offset": "its tensors overlap, or have gaps between them",
    "invalid shape": "a tensor's shape and dtype do not take as many bytes as it has",
    "overflow": "a tensor's shape is beyond all bounds",
}
"""What the reader of safetensors objects to, by words of its errors."""

logger = get_logger(__name__)


def weights_digest(directory: Path) -> str:
    """Tells checkpoints in one place apart: configuration, sizes, headers and samples of the weights. Training changes
    nearly every weight, so a few say enough; reading all would take as long as loading."""
    digest = hashlib.blake2b(digest_size=16)
    for file in (directory / "config.json", *Checkpoint(directory).files):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as content:
            for sample in range(_SAMPLES):
                content.seek(sample * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(content.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no number of a tensor is NaN or infinite."""
    if not (tensor.is_floating_point() and tensor.numel()):
        return True
    low, high = torch.aminmax(tensor)  # both are NaN if a number is; checks ten times as fast as `isfinite`
    return math.isfinite(low) and math.isfinite(high)


class LazyTensor:
    """A tensor on disk with the part of the slicing interface that transformers' loader uses.

    `lazy[...]` reads it and tells the checkpoint the bytes. `file` is the name of its file.
    """

    def __init__(self, handle: Any, file: str, name: str, checkpoint: Checkpoint) -> None:
        self.file = file
        self._name = name
        self._slice = handle.get_slice(name)
        self._checkpoint = checkpoint
        self.nbytes = math.prod(self.get_shape()) * ElementBytes.get(self.get_dtype(), 1)

    def get_shape(self) -> list[int]:
        return list(self._slice.get_shape())

    def get_dtype(self) -> str:
        return str(self._slice.get_dtype())

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.get_shape())

    def peek(self, first: int, last: int) -> torch.Tensor:
        """Rows `first .. last - 1`, which do not count as read."""
        rows: torch.Tensor = self._slice[first : min(last, self.get_shape()[0])]
        return rows

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor: torch.Tensor = self._slice[index]
        self._checkpoint.on_read(tensor.nbytes)
        return tensor


class Checkpoint(ExitStack):
    """The safetensors files of a model directory: those that its index names, or the one model file; where there are
    none, its GGUF files. A context manager: files are open inside it.

    Raises `CheckpointError` for missing or damaged files, `UnsupportedModelError` where weights have another format.
    """

    def __init__(self, path: Path, on_read: Callable[[int], None] = lambda nbytes: None) -> None:
        super().__init__()
        index = path / INDEX
        self.index = _read_index(index) if index.is_file() else {}
        self.is_gguf = not index.is_file() and is_gguf(path)
        if self.is_gguf:
            self.files = list(gguf_files(path))
        else:
            self.files = _indexed_files(path, self.index) if index.is_file() else _unindexed_files(path)
        self.on_read = on_read
        self._path = path

    @property
    def total_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def tensors(self) -> Mapping[str, LazyTensor | LazyGgufTensor]:
        """All tensors by name, none read yet. Plain reads, not a memory map: a map would count, page by page, as
        resident memory of the process beside the tensors themselves.
        """
        if self.is_gguf:
            return gguf_tensors(tuple(self.files), self.on_read)
        found: dict[str, LazyTensor] = {}
        for file in self.files:
            handle = self._open(file)
            label = file.relative_to(self._path).as_posix()
            for name in handle.keys():  # noqa: SIM118  not a dictionary
                chosen = self.index.get(name)
                if chosen is not None and chosen != label:
                    continue  # the index names another file for it
                if name in found:
                    raise CheckpointError(f"{name} is in {found[name].file} and in {label}; {INDEX} has to say which.")
                found[name] = LazyTensor(handle, label, name, self)
        lacking = sorted(set(self.index) - set(found))
        if lacking:
            raise CheckpointError(f"{INDEX} says that {lacking[0]} is in {self.index[lacking[0]]}, which lacks it.")
        return found

    def _open(self, file: Path) -> Any:
        try:
            return self.enter_context(safe_open(str(file), framework="pt", device="cpu", backend="pread"))
        except (SafetensorError, OSError) as error:
            said = str(error).lower().removeprefix("error while deserializing header: ")
            reason = next((reason for words, reason in _DAMAGE.items() if words in said), "it cannot be read")
            logger.warning("a file cannot be opened", file=str(file), error=str(error))
            raise CheckpointError(f"{file.name} is damaged or not a safetensors file: {reason}.") from error


def _unindexed_files(path: Path) -> list[Path]:
    """`model.safetensors`, the only file there is, or a whole series `x-1-of-n`: others beside it are not the model."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise _no_weights(path)
    if path / SINGLE in files:
        files = [path / SINGLE]
    series = [match for file in files if (match := _SHARD.fullmatch(file.name))]
    whole = len({(match[1], match[3]) for match in series}) == 1 and len(series) == len(files)
    if len(files) > 1 and not (whole and len(files) == int(series[0][3])):
        listed = ", ".join(file.name for file in files[:4])
        raise CheckpointError(f"{path.name} has {len(files)} safetensors files ({listed}) and no {INDEX} to choose by.")
    if len(files) == 1 and series and int(series[0][3]) > 1:
        raise CheckpointError(f"{path.name} has {files[0].name} alone of {int(series[0][3])} files.")
    return [_inside(path, file.name) for file in files]


def _no_weights(path: Path) -> CheckpointError | UnsupportedModelError:
    pickled = sorted(file.name for pattern in _PICKLED for file in path.glob(pattern))
    if pickled:
        return UnsupportedModelError(
            f"{path.name} has pickled weights only ({pickled[0]}); convert them to safetensors first."
        )
    return CheckpointError(f"{path} has no *.safetensors file.")


def _read_index(index: Path) -> dict[str, str]:
    """Tensors to files, which are relative to the index."""
    files = read_json_object(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{index.name}: weight_map must give each tensor its file.")
    wrong = next((name for name, file in files.items() if not isinstance(file, str)), None)
    if wrong is not None:
        raise CheckpointError(f"{index.name}: weight_map gives {wrong} no file's name, but {files[wrong]!r}.")
    return {name: Path(file).as_posix() for name, file in files.items()}


def _indexed_files(path: Path, index: dict[str, str]) -> list[Path]:
    return [_inside(path, name) for name in sorted(set(index.values()))]


def _inside(path: Path, name: str) -> Path:
    """A file of the directory. One that is elsewhere, by its name or by a link, is refused; the hub's cache links from
    its snapshots to its own blobs."""
    file = path / name
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise CheckpointError(f"{INDEX} of {path.name} names {name!r}, which is not inside the directory.")
    if not file.is_file():
        raise CheckpointError(f"{path.name} lacks {name}, which its index names.")
    allowed = [path.resolve()]
    if path.parent.name == "snapshots":
        allowed.append((path.parent.parent / "blobs").resolve())
    if not any(file.resolve().is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{name} of {path.name} is a link to a file outside the directory; put the file there.")
    return file
