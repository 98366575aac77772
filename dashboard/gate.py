"""Which requests come from the dashboard's own pages, in a browser that has signed in."""

from __future__ import annotations

import hmac
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from core.errors import PermissionDeniedError
from core.security.access import ADMIN, READING_METHODS, Environ, Principal
from core.security.token import is_loopback
from dashboard.sessions import Session, SessionTable

COOKIE = "vramancer_session"
COOKIE_PATHS = ("/dashboard", "/socket.io")
CSRF_HEADER = "X-Dashboard-Session"
_CSRF_KEY = "HTTP_X_DASHBOARD_SESSION"
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Gate:
    """Judges requests by their heads. `bound_to` is the address that is listened on: on loopback, only names of this
    machine are taken for it, so that no other site's name can be made to point here. `origins` are further addresses
    that browsers know the dashboard by.
    """

    def __init__(self, sessions: SessionTable, bound_to: str, origins: tuple[str, ...] = ()) -> None:
        self.sessions = sessions
        self._local = is_loopback(bound_to)
        self._origins = frozenset(filter(None, map(_normal, origins)))
        self._hosts = frozenset(urlsplit(origin).hostname for origin in self._origins)

    def check_host(self, environ: Environ) -> None:
        """Raise `PermissionDeniedError` for a name that is none of this server."""
        host = _hostname(environ.get("HTTP_HOST", ""))
        if self._local and not is_loopback(host) and host not in self._hosts:
            raise PermissionDeniedError(
                f"The dashboard is not at {host!r}; dashboard.origins (VRM_DASHBOARD_ORIGINS) lists its other "
                "addresses.",
                code="wrong_host",
            )

    def session(self, environ: Environ, *, use: bool = True) -> Session | None:
        """That of the request's cookie."""
        return self.sessions.find(session_name(environ), use=use)

    def signed_in(self, environ: Environ) -> Principal | None:
        """Who sends a request to a route that asks for a session; None without one.

        Raises `PermissionDeniedError` for a request that another site may have made.
        """
        session = self.session(environ)
        if session is None:
            return None
        self.check_host(environ)
        changes = environ["REQUEST_METHOD"] not in READING_METHODS
        self.check_origin(environ, needed=changes)
        if changes:
            self.check_csrf(environ, session)
        return ADMIN

    def watcher(self, environ: Environ) -> Session | None:
        """The session of a request for live data, which has to prove whose it is even to read; as `signed_in`."""
        session = self.session(environ)
        if session is None:
            return None
        self.check_host(environ)
        self.check_origin(environ, needed=environ["REQUEST_METHOD"] not in READING_METHODS)
        self.check_csrf(environ, session)
        return session

    def check_origin(self, environ: Environ, *, needed: bool) -> None:
        """Raise `PermissionDeniedError` for another site's request; `needed`: also for one that does not say whose it
        is. Browsers say so of all requests but plain reading ones."""
        origin, fetched_by = environ.get("HTTP_ORIGIN"), environ.get("HTTP_SEC_FETCH_SITE")
        ours = _normal(origin or "") in self._origins or _same(origin or "", environ.get("HTTP_HOST", ""))
        foreign = not ours if origin is not None else needed
        if foreign or fetched_by not in (None, "same-origin", "none"):
            raise PermissionDeniedError(
                f"This came from {origin or 'an unknown page'}, not from the dashboard. Behind a proxy, list its "
                "address in dashboard.origins (VRM_DASHBOARD_ORIGINS).",
                code="wrong_origin",
            )

    def check_csrf(self, environ: Environ, session: Session) -> None:
        """Raise `PermissionDeniedError` unless the request names its session in a header too."""
        given = str(environ.get(_CSRF_KEY, "")).encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(given, session.csrf.encode()):
            raise PermissionDeniedError(f"{CSRF_HEADER} is missing or wrong; load the page again.", code="wrong_csrf")


def cookie_name(environ: Environ) -> str:
    """Cookies do not tell ports of a machine apart, so their names do: two servers may have a dashboard each."""
    try:
        port = urlsplit(f"//{environ.get('HTTP_HOST', '')}").port
    except ValueError:
        port = None
    return COOKIE if port is None else f"{COOKIE}_{port}"


def session_name(environ: Environ) -> str | None:
    """The name of the session that the request's cookie holds."""
    try:
        morsel = SimpleCookie(environ.get("HTTP_COOKIE", "")).get(cookie_name(environ))
    except CookieError:
        return None
    return morsel.value if morsel is not None else None


def is_secure(environ: Environ) -> bool:
    """Whether the browser came by https, here or at a proxy in front: then its page's origin says so."""
    return environ.get("wsgi.url_scheme") == "https" or str(environ.get("HTTP_ORIGIN", "")).startswith("https://")


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _normal(origin: str) -> str | None:
    """The origin without a default port; None if it is none."""
    try:
        parts = urlsplit(origin)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        return None
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}" + ("" if port in (None, _DEFAULT_PORTS[parts.scheme]) else f":{port}")


def _same(origin: str, host: str) -> bool:
    """Whether a page of `origin` is one of the server that is addressed as `host`, over TLS or not."""
    normal = _normal(origin)
    return normal is not None and normal == _normal(f"{normal.partition(':')[0]}://{host}")
