"""L5: segment files in a local directory.

Writes go through the page cache. A segment is made lasting when it is sealed: its data is synced, it is renamed from
its temporary name, and the directory is synced. Until then a crash loses it, which costs recomputing and nothing else;
what a crashed process left unsealed is removed at the next start. Files are readable by their owner alone: KV is as
private as the prompts it was computed from. One process uses a directory at a time; a lock says whose turn it is.
"""

from __future__ import annotations

import functools
import os
import shutil
import threading
from io import FileIO
from pathlib import Path

import filelock

from core.errors import ConflictError
from core.tiers.segments import SUFFIX, new_name

LOCK_NAME = "vramancer-kv.lock"
PARTIAL = ".partial"


_private = functools.partial(os.open, mode=0o600)


class LocalFile:
    """A segment being written; see `OpenFile`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._name = new_name()
        self._partial = directory / (self._name + PARTIAL)
        self._lock = threading.Lock()  # guards the position
        self._file = open(self._partial, "x+b", buffering=0, opener=_private)  # noqa: SIM115 (closed by its owner)

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        with self._lock:
            self._file.seek(offset)
            while view:
                view = view[self._file.write(view) :]

    def read_at(self, offset: int, into: memoryview) -> int:
        with self._lock:
            return _read(self._file, offset, into)

    def seal(self) -> str:
        os.fsync(self._file.fileno())
        self._partial.rename(self._directory / self._name)
        if os.name == "posix":
            folder = os.open(self._directory, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        return self._name

    def close(self) -> None:
        self._file.close()

    def discard(self) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)


def _read(file: FileIO, offset: int, into: memoryview) -> int:
    file.seek(offset)
    done = 0
    while done < len(into):
        count = file.readinto(into[done:])
        if not count:
            break
        done += count
    return done


class LocalFiles:
    """See `SegmentFiles`."""

    def __init__(self, directory: Path) -> None:
        """Creates the directory if need be and locks it. Raises `ConflictError` if another process keeps its
        blocks there, or `OSError`."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory = directory
        # Any thread may close what another opened: the next model is loaded, and this one unloaded, by other threads.
        self._lock = filelock.FileLock(directory / LOCK_NAME, timeout=0, thread_local=False)
        try:
            self._lock.acquire()
        except filelock.Timeout as error:
            raise ConflictError(
                f"{directory} is in use by another process; give each its own memory.disk_path."
            ) from error

    def list(self) -> list[tuple[str, int]]:
        for leftover in self.directory.glob("*" + PARTIAL):
            leftover.unlink(missing_ok=True)
        return [(path.name, path.stat().st_size) for path in self.directory.glob("*" + SUFFIX)]

    def read(self, name: str, offset: int, into: memoryview) -> int:
        with (self.directory / name).open("rb", buffering=0) as file:
            return _read(file, offset, into)

    def start(self) -> LocalFile:
        return LocalFile(self.directory)

    def delete(self, name: str) -> None:
        (self.directory / name).unlink(missing_ok=True)

    def free_bytes(self) -> int | None:
        return shutil.disk_usage(self.directory).free

    def close(self) -> None:
        self._lock.release()
