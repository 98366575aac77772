"""Notices ends of links that say nothing any more: pulled cables, stopped processes, machines without power."""

from __future__ import annotations

import threading
import time

from core.network.link import Link

HEARTBEAT_S = 0.25
"""Between two signs of life on a link that is watched."""
SILENCE_S = 1.5
"""After which an end that says nothing counts as gone."""
_LOOKS = 8


class Watch:
    """Ends each link whose other end has been silent for `silence_s`. One thread looks at all of them.

    Where this process itself has stood still, it looks once more before it blames others: what they said meanwhile may
    not have been read yet.
    """

    def __init__(self, silence_s: float = SILENCE_S) -> None:
        self._silence_s = silence_s
        self._links: set[Link] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name="vrm-watch", daemon=True)
        self._thread.start()

    def add(self, link: Link) -> None:
        with self._lock:
            self._links.add(link)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _look(self) -> None:
        every_s = self._silence_s / _LOOKS
        looked_s = time.monotonic()
        while not self._closed.wait(every_s):
            before_s, looked_s = looked_s, time.monotonic()
            stood_still = looked_s - before_s > self._silence_s / 2
            with self._lock:
                self._links = {link for link in self._links if link.error is None}
                links = [] if stood_still else list(self._links)
            for link in links:
                silent_s = looked_s - link.heard_s
                if silent_s > self._silence_s:
                    link.abort(f"silent for {silent_s:.1f} s")
