"""From what a user calls a model to a local directory: the bundled demo model, a directory, or a hub id."""

from __future__ import annotations

import errno
import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import scan_cache_dir, snapshot_download
from huggingface_hub.errors import (
    CacheNotFound,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from core.defaults import DEMO_EMBEDDING_NAME, DEMO_NAME
from core.errors import InvalidRequestError, ModelNotFoundError
from core.logs import get_logger
from core.models.formats import refuse_file

logger = get_logger(__name__)

DEMO_PATH = Path(__file__).parent / "demo"
DEMO_EMBEDDING_PATH = Path(__file__).parent / "demo_embedding"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_REVISION = re.compile(r"[\w./-]{1,200}")
_TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""What the hub's HTTP client raises, whichever that is."""
_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]
_CONFIG_FILES = ["config.json", "generation_config.json"]
_OTHER_WEIGHTS = ["*.gguf", "*.bin", "*.pt", "*.pth"]
_INDEX = "model.safetensors.index.json"


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


def resolve_model(name: str | None, revision: str | None = None, *, config_only: bool = False) -> ResolvedModel:
    """Find a model, downloading it from the hub if it is not there yet (safetensors and text files alone; with
    `config_only` no more than what a plan needs).

    Raises `ModelNotFoundError`, `InvalidRequestError` for what can be no name, and `UnsupportedModelError` for a file.
    """
    if name is None or name == DEMO_NAME:
        return ResolvedModel(DEMO_NAME, DEMO_PATH)
    if name == DEMO_EMBEDDING_NAME:
        return ResolvedModel(DEMO_EMBEDDING_NAME, DEMO_EMBEDDING_PATH)
    place = _local(name)
    if place is not None and place.is_dir():
        return ResolvedModel(place.name, place)
    if place is not None:
        raise refuse_file(place)
    if not _HUB_ID.fullmatch(name):
        raise ModelNotFoundError(f"There is no directory {name!r}, and it is not a hub id (owner/name).", param="model")
    if revision is not None and not _REVISION.fullmatch(revision):
        raise InvalidRequestError(f"{revision!r} can be no branch, tag or commit.", param="revision")
    return _from_hub(name, revision, config_only)


def _local(name: str) -> Path | None:
    """The directory or file of this name, if there is one."""
    if "\0" in name:
        raise InvalidRequestError("model must not hold a NUL character.", param="model")
    try:
        path = Path(name).expanduser()
        path.stat()
        return path.resolve()
    except RuntimeError as error:
        raise InvalidRequestError(
            f"{name!r} begins with the home of a user who is not known.", param="model"
        ) from error
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
        raise InvalidRequestError(f"{name[:200]!r} cannot be looked at: {reason}.", param="model") from error


def _from_hub(name: str, revision: str | None, config_only: bool) -> ResolvedModel:
    files = _CONFIG_FILES if config_only else _FILES
    kept: Path | None = None
    try:
        with suppress(LocalEntryNotFoundError):
            kept = Path(snapshot_download(name, revision=revision, allow_patterns=files, local_files_only=True))
        if kept is not None and ((kept / "config.json").exists() if config_only else _is_whole(kept)):
            return ResolvedModel(name, kept, revision)
        path = Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, _TRANSPORT_ERROR, OSError) as error:
        logger.warning("a model cannot be had from the hub", model=name, revision=revision, error=repr(error))
        if kept is not None and any(any(kept.glob(pattern)) for pattern in _OTHER_WEIGHTS):
            return ResolvedModel(name, kept, revision)  # named for what it is where the checkpoint is read
        raise ModelNotFoundError(_why_not(name, revision, error), param="model") from error
    return ResolvedModel(name, path, revision)


def _is_whole(path: Path) -> bool:
    """Whether a snapshot has its config and its weights. A download may have been cut off, or of the config alone."""
    try:
        named = json.loads((path / _INDEX).read_bytes())["weight_map"].values()
        weights = all((path / file).exists() for file in named)
    except FileNotFoundError:
        weights = any(path.glob("*.safetensors"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        weights = True  # a wrong index is named where the checkpoint is read
    return weights and (path / "config.json").exists()


def _why_not(name: str, revision: str | None, error: Exception) -> str:
    """What keeps a model from being had from the hub, and what to do. Kinds of errors come before their families."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__
    if isinstance(error, GatedRepoError):
        return f"{name!r} is gated: accept its terms on the hub, and set HF_TOKEN to a token of that account."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{name!r} is neither a local directory nor a model of the hub; for a private one, set HF_TOKEN to a token "
            "that may read it."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{name!r} has no revision {revision!r} on the hub."
    if isinstance(error, HFValidationError):
        return f"There is no directory {name!r}, and it is not a hub id (owner/name)."
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return f"The hub does not give {name!r}: it answers {status}. Try again later, or give a local directory."
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
        return f"{name!r} cannot be kept on this disk: {error.strerror}. HF_HOME says where the hub's files go."
    return (
        f"{name!r} is neither a local directory nor in the hub's cache, and there is no connection to the hub. Connect "
        "this machine (HTTPS_PROXY and HF_ENDPOINT are heeded, HF_HUB_OFFLINE must not be set), or download the model "
        "elsewhere and give its directory."
    )


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
            if _is_whole(path):
                found.append(_entry(repo.repo_id, path))
    return found


def _entry(name: str, path: Path) -> AvailableModel:
    size = sum(file.stat().st_size for file in path.rglob("*.safetensors"))
    return AvailableModel(name, str(path), size)
