"""An object store whose driver fails when it is told to."""

from __future__ import annotations

from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class BackendError(Exception):
    """What a driver raises that knows nothing of `OSError`."""


class BrokenStore(MemoryFileSystem):  # type: ignore[misc]
    """`broken://`: an object store in memory whose operations named in `fails` raise an error of the driver's own."""

    protocol = "broken"
    cachable = False
    store: dict[str, Any] = {}
    pseudo_dirs: list[str] = [""]
    fails: frozenset[str] = frozenset()

    def __init__(self, *args: Any, **options: Any) -> None:
        self._do("open")
        super().__init__(*args, **options)

    def _do(self, what: str) -> None:
        if what in self.fails:
            raise BackendError(f"cannot {what}")

    def makedirs(self, *args: Any, **options: Any) -> Any:
        self._do("makedirs")
        return super().makedirs(*args, **options)

    def ls(self, *args: Any, **options: Any) -> Any:
        self._do("list")
        return super().ls(*args, **options)

    def cat_file(self, *args: Any, **options: Any) -> Any:
        self._do("read")
        return super().cat_file(*args, **options)

    def pipe_file(self, *args: Any, **options: Any) -> Any:
        self._do("write")
        return super().pipe_file(*args, **options)

    def rm_file(self, *args: Any, **options: Any) -> Any:
        self._do("delete")
        return super().rm_file(*args, **options)


fsspec.register_implementation("broken", BrokenStore, clobber=True)
