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
from core.errors import CheckpointError, InvalidRequestError, ModelNotFoundError
from core.logs import get_logger
from core.models.formats import is_gguf_file, refuse_file
from core.models.gguf.header import gguf_files, is_gguf, series_of
from core.models.json_files import read_json_object

logger = get_logger(__name__)

DEMO_PATH = Path(__file__).parent / "demo"
DEMO_EMBEDDING_PATH = Path(__file__).parent / "demo_embedding"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_GGUF_ID = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}):([\w.*?-]{1,100})")
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


def resolve_model(
    name: str | None, revision: str | None = None, *, config_only: bool = False, cache_dir: Path | None = None
) -> ResolvedModel:
    """Find a model, downloading it from the hub if it is not there yet (safetensors and text files alone; with
    `config_only` no more than what a plan needs). What is made of GGUF files is kept in `cache_dir`; None refuses
    them. From the hub they have a pattern behind the name, such as `owner/name:Q4_K_M`.

    Raises `ModelNotFoundError`, `InvalidRequestError` for what can be no name, and `UnsupportedModelError` for a file.
    """
    if name is None or name == DEMO_NAME:
        return ResolvedModel(DEMO_NAME, DEMO_PATH)
    if name == DEMO_EMBEDDING_NAME:
        return ResolvedModel(DEMO_EMBEDDING_NAME, DEMO_EMBEDDING_PATH)
    place = _local(name)
    if place is not None and place.is_dir():
        packed = gguf_files(place) if cache_dir is not None and is_gguf(place) and not _is_prepared(place) else ()
        return ResolvedModel(place.name, _prepared(packed, cache_dir) if packed and cache_dir else place)
    if place is not None and cache_dir is not None and is_gguf_file(place):
        return ResolvedModel(place.stem, _prepared(series_of(place), cache_dir))
    if place is not None:
        raise refuse_file(place)
    in_repository = _GGUF_ID.fullmatch(name)
    if in_repository is not None and cache_dir is not None:
        return _gguf_from_hub(name, in_repository[1], in_repository[2], revision, cache_dir)
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


def _prepared(files: tuple[Path, ...], cache_dir: Path) -> Path:
    from core.models.gguf.directory import gguf_directory  # needs torch and transformers, which a plan may do without

    return gguf_directory(files, cache_dir)


def _is_prepared(path: Path) -> bool:
    """Whether a directory with GGUF files is one that `gguf_directory` has made, here or on another machine."""
    try:
        settings = read_json_object(path / "config.json").get("quantization_config")
    except CheckpointError:
        return False
    return isinstance(settings, dict) and settings.get("quant_method") == "gguf"


def _gguf_from_hub(name: str, repository: str, pattern: str, revision: str | None, cache_dir: Path) -> ResolvedModel:
    patterns = [f"*{each}*.gguf" for each in sorted({pattern, pattern.lower(), pattern.upper()})]
    try:
        path = Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, _TRANSPORT_ERROR, OSError) as error:
        logger.warning("a model cannot be had from the hub", model=name, revision=revision, error=repr(error))
        raise ModelNotFoundError(_why_not(repository, revision, error), param="model") from error
    files = sorted({file for each in patterns for file in path.rglob(each)})
    if not files:
        raise ModelNotFoundError(f"{repository!r} has no GGUF file with {pattern!r} in its name.", param="model")
    series = series_of(files[0])
    if len(files) > 1 and sorted(series) != files:
        listed = ", ".join(file.name for file in files[:4])
        raise ModelNotFoundError(f"{pattern!r} is in several names of {repository!r}: {listed}.", param="model")
    return ResolvedModel(name, _prepared(series, cache_dir), revision)


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
