"""Who calls, and what a route asks of its caller. A route's policy is declared beside it, with `policy`.

Public routes need no token: liveness and readiness for orchestrators, `/health`, which then names checks without
details, `/`, `/openapi.json` and `/docs`, which say what this is, and the dashboard's page, which asks for the token,
with its files. Read-only mode (`VRM_READ_ONLY`) refuses routes that alter shared state; generating is allowed, and so
is everything that only reads. What no route answers needs a token, and counts as a change unless it only reads.

`CallerLimits` says how often: a key so many requests a minute; an address without one as many, but few wrong tokens.
"""

from __future__ import annotations

import hmac
import ipaddress
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from core.defaults import DEFAULT_OWNER
from core.errors import AuthenticationError, PermissionDeniedError, RateLimitError

TOKEN_HEADERS = ("X-API-TOKEN", "X-API-Key")
"""What holds the token and nothing else, beside `Authorization: Bearer`."""
READING_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

Role = Literal["viewer", "user", "operator", "admin"]
"""Each may do what those before it may: a viewer reads; a user also infers and cancels its own requests; an operator
also loads and places models and moves memory; an admin also gives out keys. Declared; the one token is the admin's."""

Environ = Mapping[str, Any]
"""The head of a request, as a WSGI environment."""
Route = TypeVar("Route", bound=Callable[..., Any])
_ATTRIBUTE = "route_policy"
_TOKEN_KEYS = tuple(f"HTTP_{name.upper().replace('-', '_')}" for name in TOKEN_HEADERS)


@dataclass(frozen=True, slots=True)
class Policy:
    """What a route asks: the least `role` of its caller, None if it is public; whether it alters shared state; whether
    its answer `waits` for the engine, or for other work that may take long; and whether a `session` of a browser opens
    it, and nothing else: the token does not, and a session opens no other route."""

    role: Role | None
    mutates: bool = False
    waits: bool = False
    session: bool = False


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller; `owner` is whom its requests belong to."""

    owner: str
    role: Role


ADMIN = Principal(DEFAULT_OWNER, "admin")
"""Whoever has the token."""

SignedIn = Callable[[Environ], Principal | None]
"""Tells who sends a request, by the session that its head names."""


def nobody(environ: Environ) -> Principal | None:
    """There are no sessions."""
    return None


def policy(
    role: Role | None = None,
    *,
    public: bool = False,
    mutates: bool = False,
    waits: bool = False,
    session: bool = False,
) -> Callable[[Route], Route]:
    """Declare a route's policy: `@policy("viewer")`, or `@policy(public=True)`. Raises `ValueError` for neither or
    both."""
    if public == (role is not None):
        raise ValueError("A route is either public or for a role.")

    def declare(route: Route) -> Route:
        setattr(route, _ATTRIBUTE, Policy(role, mutates, waits, session))
        return route

    return declare


def policy_of(route: Callable[..., Any]) -> Policy | None:
    """What was declared; None if nothing was."""
    return getattr(route, _ATTRIBUTE, None)


def authorize(
    declared: Policy | None,
    method: str,
    given: tuple[str | None, ...],
    expected: str,
    *,
    read_only: bool,
    signed_in: Callable[[], Principal | None] = lambda: None,
) -> Principal | None:
    """The caller, None without the right token; `declared` is None where no route matches.

    A CORS preflight cannot carry a token, so OPTIONS is public. `signed_in` tells who has a session, where that is what
    the route asks for.
    Raises `AuthenticationError` where a token or a session is needed, `PermissionDeniedError` for a change in read-only
    mode, and what `signed_in` raises.
    """
    principal: Principal | None = None
    try:
        if declared is not None and declared.session:
            principal = _with_session(method, signed_in)
        else:
            check_token(given, expected)
            principal = ADMIN
    except AuthenticationError:
        if method != "OPTIONS" and (declared is None or declared.role is not None):
            raise
    mutates = method not in READING_METHODS if declared is None else declared.mutates and method != "OPTIONS"
    if read_only and mutates:
        raise PermissionDeniedError("The server is in read-only mode; this request would change its state.")
    return principal


def _with_session(method: str, signed_in: Callable[[], Principal | None]) -> Principal:
    principal = signed_in() if method != "OPTIONS" else None
    if principal is None:
        raise AuthenticationError("Sign in to the dashboard first.", code="not_signed_in")
    return principal


def check_token(given: tuple[str | None, ...], expected: str) -> None:
    """Raise `AuthenticationError` unless one of the given tokens is the expected one. Takes constant time per token."""
    wanted = expected.encode()
    present = [token.encode("utf-8", "surrogateescape") for token in given if token]
    matches = [hmac.compare_digest(token, wanted) for token in present]
    if any(matches):
        return
    if present:
        raise AuthenticationError("The API token is wrong.")
    raise AuthenticationError(
        "This route needs the API token, as Authorization: Bearer, X-API-TOKEN or x-api-key.", code="missing_api_key"
    )


def given_tokens(environ: Environ) -> tuple[str | None, ...]:
    """Whatever the head of a request, as a WSGI environment, gives as a token; the headers are `TOKEN_HEADERS`."""
    return (*map(environ.get, _TOKEN_KEYS), bearer_token(environ.get("HTTP_AUTHORIZATION")))


def bearer_token(authorization: str | None) -> str | None:
    """The token in an Authorization header of scheme Bearer, None for any other."""
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


WRONG_TOKENS_PER_MINUTE = 20
MAX_CALLERS = 8192
"""So many callers are remembered at a time; those that have not called for longest are forgotten."""
MINUTE_S = 60.0


class RateLimit:
    """At most `per_minute` calls of each caller in any minute, on average; what was not used may come at once.

    The generic cell rate algorithm (ITU-T I.371): a caller is a single number, the time at which all that it has sent
    would have been sent at an even pace. Thread-safe, and bounded in memory. `clock` gives seconds.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval_s = MINUTE_S / per_minute
        self._clock = clock
        self._lock = threading.Lock()
        self._even_s: OrderedDict[str, float] = OrderedDict()

    def take(self, caller: str) -> float:
        """Count a call. Returns 0 if it may go on, else the seconds until one may; then it does not count."""
        with self._lock:
            now_s = self._clock()
            even_s = max(self._even_s.get(caller, now_s), now_s) + self._interval_s
            if even_s - now_s > MINUTE_S + 1e-6:
                return even_s - now_s - MINUTE_S
            self._even_s[caller] = even_s
            self._even_s.move_to_end(caller)
            while len(self._even_s) > MAX_CALLERS:
                self._even_s.popitem(last=False)
            return 0.0

    def __len__(self) -> int:
        return len(self._even_s)


class CallerLimits:
    """What callers may send in a minute. The right token is never held up by what others send from its address."""

    def __init__(self, requests_per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._requests_per_minute = requests_per_minute
        self._keys = RateLimit(requests_per_minute, clock)
        self._strangers = RateLimit(requests_per_minute, clock)
        self._wrong = RateLimit(WRONG_TOKENS_PER_MINUTE, clock)

    def check_key(self, owner: str) -> None:
        """Raise `RateLimitError` if whoever has this key has sent too much."""
        wait_s = self._keys.take(owner)
        if wait_s:
            raise RateLimitError(
                f"This server takes {self._requests_per_minute} requests a minute of one key.", retry_after_s=wait_s
            )

    def check_stranger(self, address: str | None, *, wrong_token: bool) -> None:
        """The same for a request without a token, or with a wrong one."""
        caller = network_of(address)
        wait_s = self._wrong.take(caller) if wrong_token else self._strangers.take(caller)
        if wait_s:
            said = "wrong tokens" if wrong_token else "requests"
            raise RateLimitError(f"Too many {said} have come from this address.", retry_after_s=wait_s)


def network_of(address: str | None) -> str:
    """Who is taken for one caller: an IPv4 address, or the network of 64 bits that one IPv6 subscriber has."""
    try:
        parsed = ipaddress.ip_address((address or "").partition("%")[0])
    except ValueError:
        return ""
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    mapped = parsed.ipv4_mapped
    return str(mapped) if mapped is not None else str(ipaddress.ip_network((parsed, 64), strict=False))
