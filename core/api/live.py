"""The requests under way, so that a client can cancel one by whichever id it knows."""

from __future__ import annotations

import threading


class LiveRequests:
    """Maps the id that the client knows (`X-Request-ID`) to the engine's ids; several requests may share one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engine_ids: dict[str, set[str]] = {}

    def add(self, request_id: str, engine_id: str) -> None:
        with self._lock:
            self._engine_ids.setdefault(request_id, set()).add(engine_id)

    def discard(self, request_id: str, engine_id: str) -> None:
        """Forget a request that ended. Safe to call twice."""
        with self._lock:
            engine_ids = self._engine_ids.get(request_id, set())
            engine_ids.discard(engine_id)
            if not engine_ids:
                self._engine_ids.pop(request_id, None)

    def engine_ids(self, name: str) -> list[str]:
        """The engine's ids of the requests called `name`; `name` itself when it is none of the clients' ids."""
        with self._lock:
            return sorted(self._engine_ids.get(name, ())) or [name]

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._engine_ids.values()))
