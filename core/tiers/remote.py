"""L6: segment files below a url that fsspec reads: a mounted directory (`file://`), `s3://`, `memory://` and others.

An object store cannot append, so a segment is collected in memory and written in one piece when it is sealed. That is
atomic in object stores; in a mounted directory it is written beside its place and renamed. There is no lock: every
process writes segments of its own and knows those that were there when it started.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

from core.errors import ConfigError
from core.tiers.disk import PARTIAL
from core.tiers.segments import SUFFIX, new_name


def check_url(url: str) -> None:
    """Raises `ConfigError` for a protocol that is unknown or whose package is missing."""
    with contextlib.suppress(OSError):  # whether the place answers is another matter
        _file_system(url)


def _file_system(url: str) -> tuple[Any, str]:
    """And the path in it. Raises `ConfigError` as `check_url` does, `OSError`."""
    try:
        with _os_errors():
            return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]
    except OSError as error:
        if isinstance(error.__cause__, (ImportError, ValueError)):
            raise ConfigError(f"memory.remote_url: {url} cannot be opened: {error.__cause__}") from error
        raise


class RemoteFile:
    """A segment being collected; see `OpenFile`."""

    def __init__(self, files: RemoteFiles) -> None:
        self._files = files
        self._data = bytearray()

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        if offset > len(self._data):
            self._data.extend(bytes(offset - len(self._data)))
        self._data[offset : offset + len(data)] = data

    def read_at(self, offset: int, into: memoryview) -> int:
        part = self._data[offset : offset + len(into)]
        into[: len(part)] = part
        return len(part)

    def seal(self) -> str:
        name = new_name()
        self._files.put(name, bytes(self._data))
        return name

    def close(self) -> None:
        self._data = bytearray()

    discard = close


class RemoteFiles:
    """See `SegmentFiles`."""

    def __init__(self, url: str) -> None:
        """Raises `ConfigError` for a protocol that is unknown or whose package is missing, `OSError` if the place
        cannot be reached."""
        self._fs, self._root = _file_system(url)
        protocol = self._fs.protocol
        self._renames = "file" in ((protocol,) if isinstance(protocol, str) else protocol)
        with _os_errors():
            self._fs.makedirs(self._root, exist_ok=True)

    def list(self) -> list[tuple[str, int]]:
        with _os_errors():
            self._fs.invalidate_cache()
            found = self._fs.ls(self._root, detail=True)
            names = [(str(info["name"]).rpartition("/")[2], info) for info in found]
            return [(name, int(info["size"])) for name, info in names if name.endswith(SUFFIX)]

    def read(self, name: str, offset: int, into: memoryview) -> int:
        with _os_errors():
            data = self._fs.cat_file(self._path(name), start=offset, end=offset + len(into))
            into[: len(data)] = data
            return len(data)

    def start(self) -> RemoteFile:
        return RemoteFile(self)

    def put(self, name: str, data: bytes) -> None:
        """Write a whole file, or nothing."""
        with _os_errors():
            if not self._renames:
                self._fs.pipe_file(self._path(name), data)
                return
            self._fs.pipe_file(self._path(name + PARTIAL), data)
            self._fs.mv(self._path(name + PARTIAL), self._path(name))

    def delete(self, name: str) -> None:
        with _os_errors():
            if self._fs.exists(self._path(name)):
                self._fs.rm_file(self._path(name))

    def free_bytes(self) -> int | None:
        return None

    def close(self) -> None:
        """Connections are fsspec's own."""

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


@contextmanager
def _os_errors() -> Iterator[None]:
    """What is no `OSError` becomes one: the store cannot be used now."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # every backend brings its own kinds, up to drivers that are missing
        raise OSError(f"{type(error).__name__}: {error}") from error
