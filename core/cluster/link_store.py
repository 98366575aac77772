"""What a process group of two asks of a store, told over a link."""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Callable

from torch.distributed.distributed_c10d import Store

from core.errors import ProtocolError

_PATIENCE_S = 10.0
_MAX_KEYS = 256


class LinkStore(Store):
    """Keys and values that two processes tell each other over a link: what a process group asks of a store."""

    def __init__(self, tell: Callable[[bytes], None], is_over: Callable[[], bool]) -> None:
        super().__init__()
        self._tell, self._is_over = tell, is_over
        self._known: dict[str, bytes] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]  # which is what it gets
        self._tell(key.encode() + b"\0" + value)
        self.put(key, value)

    def put(self, key: str, value: bytes) -> None:
        """What the other end has told, too. Raises `ProtocolError` if that is too much."""
        with self._changed:
            if len(self._known) >= _MAX_KEYS and key not in self._known:
                raise ProtocolError("too many keys for a process group of two")
            self._known[key] = value
            self._changed.notify_all()

    def wake(self) -> None:
        """The link has ended."""
        with self._changed:
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._known[key]

    def wait(self, keys: list[str], timeout: dt.timedelta | None = None) -> None:
        """Raises `TimeoutError`."""
        seconds = timeout.total_seconds() if timeout is not None else _PATIENCE_S
        with self._changed:
            self._changed.wait_for(lambda: self._is_over() or self.check(keys), min(seconds, _PATIENCE_S))
            if not self.check(keys):
                raise TimeoutError(f"the other end has not told {keys}")

    def check(self, keys: list[str]) -> bool:
        return all(key in self._known for key in keys)

    def delete_key(self, key: str) -> bool:
        """Here alone: nobody counts on it."""
        return self._known.pop(key, None) is not None

    def has_extended_api(self) -> bool:
        return False
