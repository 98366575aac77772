"""One thread that looks at the server for everybody who watches, about once a second, while somebody does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from core.errors import VRAMancerError
from core.logs import get_logger
from dashboard.alerts import firing
from dashboard.gateway import ApiGateway, look
from dashboard.snapshot import SOURCES, Patch, Snapshot, Source, difference

log = get_logger(__name__)

INTERVAL_S = 1.0
ALERTS_EVERY_S = 5.0
ABSENT_S = 60.0
"""After which a route that a server has not is asked for again: another one may serve there now."""
THREAD_NAME = "vrm-dashboard"

Publish = Callable[[Snapshot, Patch], None]


class Poller:
    """Looks until it is stopped; `publish` is told of each look from its thread, with what is new in it.

    A part that cannot be had keeps its last value, and `trouble` says why: the server's own word for it.
    """

    def __init__(
        self,
        gateway: ApiGateway,
        publish: Publish,
        *,
        prometheus_url: str | None = None,
        sources: Sequence[Source] = SOURCES,
        interval_s: float | None = None,
    ) -> None:
        self._gateway = gateway
        self._publish = publish
        self._prometheus_url = prometheus_url
        self._sources = sources
        self._interval_s = INTERVAL_S if interval_s is None else interval_s
        self._stopped = threading.Event()
        self._due_s: dict[str, float] = {}
        self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Publish nothing more; the thread ends with the look that it is at."""
        self._stopped.set()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> None:
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        last: Snapshot = {}
        while not self._stopped.is_set():
            begun_s = time.monotonic()
            snapshot = self._look(last)
            if not self._stopped.is_set():
                self._publish(snapshot, difference(last, snapshot))
            last = snapshot
            rest_s = self._interval_s - (time.monotonic() - begun_s)
            self._stopped.wait(max(self._interval_s / 10, rest_s))

    def _look(self, last: Snapshot) -> Snapshot:
        snapshot: Snapshot = {**last, "time": round(time.time(), 2), "trouble": None}
        for source in self._sources:
            if not self._is_due(source.name, source.every_s):
                continue
            try:
                body = look(self._gateway, source.path)
                snapshot[source.name] = None if body is None else source.shape(body)
                if body is None:
                    self._due_s[source.name] = time.monotonic() + ABSENT_S
            except VRAMancerError as error:
                self._due_s.pop(source.name)
                snapshot["trouble"] = error.message
                return snapshot  # the rest would say the same
            except (LookupError, TypeError, AttributeError) as error:
                log.warning("the API answers what the dashboard does not know", path=source.path, error=repr(error))
                snapshot[source.name] = None
        if self._prometheus_url is not None and self._is_due("alerts", ALERTS_EVERY_S):
            snapshot["alerts"] = self._alerts(self._prometheus_url)
        return snapshot

    def _is_due(self, name: str, every_s: float) -> bool:
        now_s = time.monotonic()
        if self._due_s.get(name, now_s) > now_s:
            return False
        self._due_s[name] = now_s + every_s - self._interval_s / 2
        return True

    @staticmethod
    def _alerts(url: str) -> dict[str, Any]:
        try:
            return {"firing": firing(url), "trouble": None}
        except VRAMancerError as error:
            return {"firing": [], "trouble": error.message}
