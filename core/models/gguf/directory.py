"""A GGUF model as a directory like that of any other checkpoint, made once and kept in the cache."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np

from core.errors import CheckpointError
from core.logs import get_logger
from core.models.gguf.header import GgufHeader, read_header
from core.models.gguf.metadata import config_of
from core.models.gguf.tokenizer import write_tokenizer

logger = get_logger(__name__)

FOLDER = "gguf"
"""Below the cache directory."""

_VERSION = 1
"""Of what is written; other ones are made anew."""

_FLOATS = {"F32": np.float32, "F16": np.float16}


def gguf_directory(files: tuple[Path, ...], cache_dir: Path) -> Path:
    """The directory that stands for a model in GGUF: config.json, tokenizer, and links to its files.

    Raises `CheckpointError` and `UnsupportedModelError`, and then leaves nothing.
    """
    facts = [str(_VERSION), *(f"{file.resolve()}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files)]
    digest = hashlib.blake2b("\n".join(facts).encode(), digest_size=8).hexdigest()
    target = cache_dir / FOLDER / f"{files[0].stem[:80]}-{digest}"
    if (target / "config.json").is_file() and all((target / file.name).is_file() for file in files):
        return target
    header = read_header(files)
    config = config_of(header, lambda name: _floats(header, name))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".part-", dir=target.parent))
        try:
            write_tokenizer(header, files[0], staging)
            (staging / "config.json").write_text(json.dumps(config, indent=2))
            for file in files:
                (staging / file.name).symlink_to(file.resolve())
            shutil.rmtree(target, ignore_errors=True)
            staging.rename(target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"{files[0].name} cannot be prepared in {target.parent}: {error.strerror or error}."
        ) from error
    logger.info("a GGUF model was prepared", model=files[0].name, directory=str(target))
    return target


def _floats(header: GgufHeader, name: str) -> list[float]:
    tensor = header.tensors.get(name)
    if tensor is None or tensor.kind not in _FLOATS:
        raise CheckpointError(f"The GGUF file has no {name} of plain numbers.", param="model")
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        numbers = np.frombuffer(file.read(tensor.nbytes), dtype=_FLOATS[tensor.kind])
    return [float(number) for number in numbers]
