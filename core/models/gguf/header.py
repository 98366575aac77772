"""What a GGUF file says before its tensors: metadata, and where each tensor lies."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import CheckpointError
from core.logs import get_logger

logger = get_logger(__name__)

MAGIC = b"GGUF"
SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_MOST_TENSORS = 1 << 20


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """`shape` as torch has it; `kind` is ggml's type, such as Q4_K."""

    file: Path
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Of all files of a model: metadata by key (arrays as lists), and tensors by GGUF's names."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))


def read_header(files: tuple[Path, ...]) -> GgufHeader:
    """Read the beginnings of a model's files. Raises `CheckpointError` for files that are damaged, or belong to
    different models."""
    try:
        facts = tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
        return _read(facts)
    except OSError as error:
        where = Path(error.filename or files[0]).name
        raise CheckpointError(f"{where} cannot be read: {error.strerror or error}.", param="model") from error


@functools.lru_cache(maxsize=8)
def _read(facts: tuple[tuple[str, int, int], ...]) -> GgufHeader:
    """Once for each state of the files: a vocabulary takes seconds."""
    metadata: dict[str, Any] = {}
    tensors: dict[str, GgufTensor] = {}
    for place, size, _ in facts:
        file = Path(place)
        reader = _open(file)
        if not metadata:
            metadata = {key: _value(field, file) for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        if len(reader.tensors) + len(tensors) > _MOST_TENSORS:
            raise CheckpointError(f"{file.name} has more than {_MOST_TENSORS} tensors.", param="model")
        for tensor in reader.tensors:
            if tensor.name in tensors:
                raise CheckpointError(f"{tensor.name} is in two of the files of {file.parent.name}.", param="model")
            offset, nbytes = int(tensor.data_offset), int(tensor.n_bytes)
            if offset + nbytes > size:
                raise CheckpointError(f"{file.name} is damaged: {tensor.name} ends behind it.", param="model")
            shape = tuple(int(each) for each in reversed(tensor.shape.tolist()))
            tensors[tensor.name] = GgufTensor(file, tensor.tensor_type.name, shape, offset, nbytes)
    return GgufHeader(metadata, tensors)


def _open(file: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(file)
    except Exception as error:  # the reader checks nothing, so numpy and struct say what is wrong
        logger.warning("a GGUF file cannot be read", file=str(file), error=repr(error))
        raise CheckpointError(f"{file.name} is damaged or not a GGUF file.", param="model") from error


def _value(field: Any, file: Path) -> Any:
    try:
        return field.contents()
    except (UnicodeDecodeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{file.name} is damaged: {field.name} cannot be read.", param="model") from error


def is_gguf(directory: Path) -> bool:
    """Whether a directory has its weights in GGUF files alone."""
    return not any(directory.glob("*.safetensors")) and any(directory.glob("*.gguf"))


def gguf_files(directory: Path) -> tuple[Path, ...]:
    """The GGUF files of one model in a directory: the only one, or a whole series. Empty where there are none. Raises
    `CheckpointError` where there are several models, or parts are missing."""
    files = sorted(file for file in directory.glob("*.gguf") if not file.name.startswith("mmproj"))
    if len(files) <= 1 and not any(SPLIT.fullmatch(file.name) for file in files):
        return tuple(files)
    series = series_of(files[0])
    if sorted(series) != files:
        listed = ", ".join(file.name for file in files[:4])
        raise CheckpointError(
            f"{directory.name} has {len(files)} GGUF files ({listed}); name the one that is meant.", param="model"
        )
    return series


def series_of(file: Path) -> tuple[Path, ...]:
    """A file, or all parts of the model that it is a part of. Raises `CheckpointError` for missing parts."""
    match = SPLIT.fullmatch(file.name)
    if match is None:
        return (file,)
    count = int(match[3])
    parts = tuple(file.with_name(f"{match[1]}-{number:05d}-of-{match[3]}.gguf") for number in range(1, count + 1))
    lacking = next((part for part in parts if not part.is_file()), None)
    if lacking is not None:
        raise CheckpointError(f"{lacking.name} is missing beside {file.name}.", param="model")
    return parts
