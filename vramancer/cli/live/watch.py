"""Watching a server from a thread of its own, so that nothing it does holds up the keys."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from urllib.parse import quote

from core.errors import AuthenticationError, VRAMancerError
from vramancer.cli.live.connection import KeptClient
from vramancer.cli.live.look import Inquiry, Look
from vramancer.cli.live.trend import Lately, Trend

REFUSED_S = 10.0
"""A server that does not know the token any more is asked again so seldom: wrong tokens are counted."""
_JOIN_S = 1.0

Connect = Callable[[], KeptClient]


@dataclass(frozen=True, slots=True)
class Seen:
    """The last look and what changed before it. `trouble` says why there is no newer one, `asked_s` since when one is
    waited for; `paused`: none is made."""

    look: Look
    lately: Lately
    trouble: str = ""
    asked_s: float | None = None
    paused: bool = False


class Watcher:
    """Looks at a server every `interval_s`. `connect` makes a client, with the token that is known by then.

    `seen` is replaced as a whole and may be read by any thread. `changed` is called after each change, in the thread
    that watches.
    """

    def __init__(self, connect: Connect, interval_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._connect = connect
        self._interval_s = interval_s
        self._clock = clock
        self._trend = Trend()
        self._wake = threading.Condition()
        self._stopping = False
        self._paused = False
        self._thread: threading.Thread | None = None
        self._changed: Callable[[], None] = lambda: None
        self.failure: BaseException | None = None
        self._client = connect()
        self._inquiry = Inquiry(self._client, clock)
        try:
            look = self._inquiry.look()
        except BaseException:
            self._client.close()
            raise
        self.seen = Seen(look, self._trend.add(look))

    def start(self, changed: Callable[[], None]) -> None:
        """Begin to watch."""
        self._changed = changed
        self._thread = threading.Thread(target=self._run, name="vrm-dashboard", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Whatever the server does: a request under way is given up. A thread that hangs in the system's look-up of a
        name is left to end with the process."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._client.end()
        if self._thread is None:
            self._client.close()
        else:
            self._thread.join(_JOIN_S)

    def pause(self) -> None:
        """Look no more; or go on, at once."""
        with self._wake:
            self._paused = not self._paused
            self._wake.notify()

    def cancel(self, request_id: str, done: Callable[[str], None]) -> None:
        """End a request of the server, in another thread; `done` is told, there, what came of it."""
        threading.Thread(target=self._cancel, args=(request_id, done), name="vrm-dashboard-cancel", daemon=True).start()

    def _cancel(self, request_id: str, done: Callable[[str], None]) -> None:
        try:
            client = self._connect()
            try:
                client.post(f"/api/requests/{quote(request_id, safe='')}/cancel", {})
            finally:
                client.close()
        except VRAMancerError as error:
            why = error.message.removeprefix(f"{self.seen.look.url}: ")
            done(f"{request_id} is not cancelled: {why}")
        else:
            done(f"{request_id} is cancelled.")

    def _run(self) -> None:
        try:
            self._watch()
        except BaseException as error:  # noqa: BLE001 (the screen raises it)
            self.failure = error
            self._changed()
        finally:
            self._client.close()

    def _watch(self) -> None:
        wait_s = self._interval_s
        while self._waited(wait_s):
            began_s = self._clock()
            self.seen = replace(self.seen, asked_s=began_s)
            wait_s = self._look()
            if self._stopping:
                return
            self._changed()
            wait_s = max(wait_s - (self._clock() - began_s), wait_s / 2)

    def _waited(self, wait_s: float) -> bool:
        """After the wait, and after a pause; False once it is to stop."""
        with self._wake:
            self._wake.wait_for(lambda: self._stopping or self._paused, wait_s)
            if self._paused and not self._stopping:
                self.seen = replace(self.seen, paused=True)
                self._changed()
                self._wake.wait_for(lambda: self._stopping or not self._paused)
                self.seen = replace(self.seen, paused=False)
            return not self._stopping

    def _look(self) -> float:
        """Look, and return how long to wait until the next."""
        try:
            look = self._inquiry.look()
        except AuthenticationError as error:
            self._open_again()
            self.seen = replace(self.seen, trouble=error.message, asked_s=None)
            return max(REFUSED_S, self._interval_s)
        except VRAMancerError as error:
            if not self._stopping:  # else it has been given up
                self.seen = replace(self.seen, trouble=error.message, asked_s=None)
            return self._interval_s
        self.seen = Seen(look, self._trend.add(look))
        return self._interval_s

    def _open_again(self) -> None:
        """With the token of a server that has been set up anew."""
        self._client.close()
        self._client = self._connect()
        self._inquiry = Inquiry(self._client, self._clock)
