"""Who is signed in: random names in cookies, kept here by their hashes, few and for a while."""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

MAX_SESSIONS = 256
"""Beyond these, the one that was not used for longest ends."""
LONGEST_S = 30 * 86400.0
"""However much it is used."""
_SECRET_BYTES = 32


@dataclass(slots=True)
class Session:
    """A browser that gave the token. `csrf` goes with each of its calls in a header, which other sites cannot set."""

    key: str
    csrf: str
    begun_s: float
    used_s: float


class SessionTable:
    """Thread-safe. A session ends `idle_s` after its last use. `clock` gives seconds."""

    def __init__(self, idle_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.idle_s = idle_s
        self._clock = clock
        self._lock = threading.Lock()
        self._sessions: OrderedDict[str, Session] = OrderedDict()  # by hash; last used last

    def begin(self) -> tuple[str, Session]:
        """A new session, and the name that its browser keeps."""
        name, now_s = secrets.token_urlsafe(_SECRET_BYTES), self._clock()
        session = Session(_key(name), secrets.token_urlsafe(_SECRET_BYTES), now_s, now_s)
        with self._lock:
            self._sessions[session.key] = session
            while len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)
        return name, session

    def find(self, name: str | None, *, use: bool = True) -> Session | None:
        """The session of this name, if it has not ended. Looking it up is a use, unless told otherwise."""
        return self._find(_key(name), use) if name else None

    def has(self, key: str) -> bool:
        """Whether the session of this key goes on."""
        return self._find(key, False) is not None

    def _find(self, key: str, use: bool) -> Session | None:
        with self._lock:
            session, now_s = self._sessions.get(key), self._clock()
            if session is None:
                return None
            if now_s - session.used_s > self.idle_s or now_s - session.begun_s > LONGEST_S:
                del self._sessions[key]
                return None
            if use:
                session.used_s = now_s
                self._sessions.move_to_end(key)
            return session

    def end(self, session: Session) -> None:
        """Sign out. Safe to call twice."""
        with self._lock:
            self._sessions.pop(session.key, None)

    def __len__(self) -> int:
        return len(self._sessions)


def _key(name: str) -> str:
    """What a name is looked up by, so that no comparison tells how much of a guess was right."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
