"""From what a user calls a model to a local directory: the bundled demo model, a directory, or a hub id."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import scan_cache_dir, snapshot_download
from huggingface_hub.errors import CacheNotFound, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from core.defaults import DEMO_NAME
from core.errors import ModelNotFoundError

DEMO_PATH = Path(__file__).parent / "demo"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model that is on disk. `name` is what clients call it."""

    name: str
    path: Path
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class AvailableModel:
    """A model that could be loaded by its `id`, or is. Bytes are of safetensors files."""

    id: str
    path: str
    size_bytes: int
    loaded: bool = False


def resolve_model(name: str | None, revision: str | None = None) -> ResolvedModel:
    """Find a model, downloading it from the hub if it is not there yet (safetensors and text files alone).

    Raises `ModelNotFoundError`.
    """
    if name is None or name == DEMO_NAME:
        return ResolvedModel(DEMO_NAME, DEMO_PATH)
    directory = Path(name).expanduser()
    if directory.is_dir():
        return ResolvedModel(directory.resolve().name, directory.resolve())
    if not _HUB_ID.fullmatch(name):
        raise ModelNotFoundError(f"There is no directory {name!r}, and it is not a hub id (owner/name).", param="model")
    return _from_hub(name, revision)


def _from_hub(name: str, revision: str | None) -> ResolvedModel:
    try:
        try:
            path = snapshot_download(name, revision=revision, allow_patterns=_FILES, local_files_only=True)
        except LocalEntryNotFoundError:
            path = snapshot_download(name, revision=revision, allow_patterns=_FILES)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ModelNotFoundError(
            f"{name!r} is neither a local directory nor a model that the hub gives: {reason}", param="model"
        ) from error
    return ResolvedModel(name, Path(path), revision)


def available_models() -> list[AvailableModel]:
    """Models on disk that could be loaded: the demo model and the hub's cache."""
    found = [_entry(DEMO_NAME, DEMO_PATH)]
    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        return found
    for repo in sorted(cache.repos, key=lambda item: item.repo_id):
        if repo.repo_type != "model":
            continue
        for revision in sorted(repo.revisions, key=lambda item: -item.last_modified)[:1]:
            path = revision.snapshot_path
            if (path / "config.json").exists() and any(path.glob("*.safetensors")):
                found.append(_entry(repo.repo_id, path))
    return found


def _entry(name: str, path: Path) -> AvailableModel:
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return AvailableModel(name, str(path), size)
