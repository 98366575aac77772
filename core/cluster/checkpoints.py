"""Where a node has a checkpoint: its own copy, found by digest, or one that its master has sent and that it keeps."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from core.cluster.message_types import MAX_CHUNK_BYTES
from core.cluster.messages import Chunk, FileRef, ModelRef, ReadFile
from core.defaults import DEMO_NAME
from core.devices import format_bytes
from core.errors import CheckpointError, NotFoundError, VRAMancerError
from core.logs import get_logger
from core.models.checkpoint import INDEX, Checkpoint, weights_digest
from core.models.resolve import DEMO_PATH, available_models

logger = get_logger(__name__)

FOLDER = "checkpoints"
"""Below the cache directory: what a master has sent, by digest."""

Ask = Callable[[ReadFile], Chunk]


def model_ref(name: str, path: Path, revision: str | None, dtype: str, quantize: str = "") -> ModelRef:
    """What tells other nodes which checkpoint is meant. Raises `CheckpointError`."""
    found = [path / "config.json", path / INDEX, *Checkpoint(path).files]
    files = tuple(FileRef(file.name, file.stat().st_size) for file in found if file.is_file())
    return ModelRef(name, str(path), revision, weights_digest(path), dtype, files, quantize)


def read_chunk(path: Path, files: tuple[FileRef, ...], asked: ReadFile) -> Chunk:
    """Bytes of one of a checkpoint's files, for another node. Raises `NotFoundError` for any other file."""
    if asked.name not in (file.name for file in files):
        raise NotFoundError(f"{asked.name} is not part of the checkpoint.")
    with (path / asked.name).open("rb") as file:
        file.seek(asked.offset)
        return Chunk(file.read(asked.nbytes))


class CheckpointStore:
    """The checkpoints of this node. Copies that were sent are kept under `cache_dir`."""

    def __init__(self, cache_dir: Path) -> None:
        self._folder = cache_dir / FOLDER
        self._known: dict[str, Path] = {}

    def find(self, ref: ModelRef, ask: Ask) -> Path:
        """The directory of a checkpoint, which is fetched with `ask` if it is not here. Raises `CheckpointError`."""
        path = self._known.get(ref.digest)
        if path is None or not is_checkpoint(path, ref.digest):
            path = next((each for each in self._places(ref) if is_checkpoint(each, ref.digest)), None)
        if path is None:
            path = self._fetch(ref, ask)
        self._known[ref.digest] = path
        return path

    def _places(self, ref: ModelRef) -> Iterator[Path]:
        yield self._folder / ref.digest
        yield Path(ref.path)
        if ref.name == DEMO_NAME:
            yield DEMO_PATH
        yield from (Path(model.path) for model in available_models() if model.id == ref.name)

    def _fetch(self, ref: ModelRef, ask: Ask) -> Path:
        total = sum(file.nbytes for file in ref.files)
        logger.info("fetching a checkpoint from the master", model=ref.name, size=format_bytes(total))
        partial, done = self._folder / f"{ref.digest}.part", self._folder / ref.digest
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            free = shutil.disk_usage(partial).free
            if free < total:
                raise CheckpointError(f"{ref.name} has {format_bytes(total)}, and the disk of {partial} {free} free.")
            for file in ref.files:
                _copy(partial / file.name, file, ref.digest, ask)
            if not is_checkpoint(partial, ref.digest):
                raise CheckpointError(f"{ref.name} has changed while it was sent; load it again.")
            shutil.rmtree(done, ignore_errors=True)
            partial.rename(done)
        except OSError as error:
            raise CheckpointError(f"{ref.name} cannot be kept in {partial}: {error.strerror or error}.") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return done


def is_checkpoint(path: Path, digest: str) -> bool:
    """Whether the directory holds the checkpoint with this digest."""
    try:
        return weights_digest(path) == digest
    except (OSError, VRAMancerError):
        return False


def _copy(target: Path, file: FileRef, digest: str, ask: Ask) -> None:
    with target.open("xb") as out:
        while (offset := out.tell()) < file.nbytes:
            data = ask(ReadFile(digest, file.name, offset, min(MAX_CHUNK_BYTES, file.nbytes - offset))).data
            if not data:
                raise CheckpointError(f"{file.name} is shorter than it was; load the model again.")
            out.write(data)
