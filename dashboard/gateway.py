"""How the dashboard reaches the API: as a WSGI application of this process, or over HTTP. Always with the token."""

from __future__ import annotations

import contextvars
import http.client
import io
import json
import ssl
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote, urlsplit

from core.errors import ConfigError, UnavailableError, VRAMancerError
from core.security.admission import DISCONNECTED_KEY

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

CONNECT_TIMEOUT_S = 10.0
LOOK_TIMEOUT_S = 5.0
"""For a look at the server's state: each wait, for the connection and for the answer."""
PASSED_ON = ("content-type", "retry-after", "x-request-id")
"""Headers of an answer that its reader gets."""
_PIECE_BYTES = 1 << 16


def _present() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class ApiCall:
    """A request to the API. `gone` says whether nobody waits for the answer any more; a `quiet` one is a look at the
    state, again and again."""

    method: str
    path: str
    query: str = ""
    body: bytes = b""
    gone: Callable[[], bool] = _present
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class ApiAnswer:
    """`pieces` come as the API makes them. `close` it, read or not: an answer that goes on ends then."""

    status: int
    headers: Mapping[str, str]
    pieces: Iterable[bytes]
    close: Callable[[], None] = field(default=lambda: None)

    def json(self) -> Any:
        """The whole body. Raises `ValueError` for what is no JSON."""
        try:
            return json.loads(b"".join(self.pieces))
        finally:
            self.close()


class ApiGateway(Protocol):
    """Thread-safe."""

    def call(self, call: ApiCall) -> ApiAnswer:
        """Raises `UnavailableError` where nobody answers."""


def look(gateway: ApiGateway, path: str) -> Any:
    """The JSON that GET `path` answers; None where the server has no such route. A server that says it is not well
    has answered.

    Raises:
        VRAMancerError: there is no answer, or another error.
    """
    path, _, query = path.partition("?")
    answer = gateway.call(ApiCall("GET", path, query, quiet=True))
    try:
        body = answer.json()
    except ValueError:
        raise UnavailableError(f"{path} answers something other than JSON.") from None
    if answer.status == 404:
        return None
    if answer.status >= 400 and "error" in body:
        raise VRAMancerError(str(body["error"].get("message", answer.status)))
    return body


class AppGateway:
    """The application of this process. `bind` names it, since it has to know the dashboard's routes first."""

    def __init__(self, token: str) -> None:
        self._token = token
        self._app: WSGIApplication | None = None

    def bind(self, app: WSGIApplication) -> None:
        self._app = app

    def call(self, call: ApiCall) -> ApiAnswer:
        """In the caller's thread. What the application keeps for a request is kept apart from the caller's own: each
        has a context of its own, as it would in another thread."""
        assert self._app is not None, "the application is bound before it is called"
        begun: list[tuple[int, dict[str, str]]] = []
        written: list[bytes] = []

        def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
            begun[:] = [(int(status[:3]), _passed_on(headers))]
            return written.append

        context = contextvars.Context()
        pieces = _Pieces(context, context.run(self._app, self._environ(call), start))
        early = next(pieces, b"") if not begun else b""
        pieces.first = [piece for piece in (*written, early) if piece]
        status, headers = begun[0]
        return ApiAnswer(status, headers, pieces, pieces.close)

    def _environ(self, call: ApiCall) -> dict[str, Any]:
        environ: dict[str, Any] = {
            "REQUEST_METHOD": call.method,
            "SCRIPT_NAME": "",
            "PATH_INFO": call.path.encode().decode("latin-1"),
            "QUERY_STRING": call.query,
            "SERVER_NAME": "localhost",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "REMOTE_ADDR": "127.0.0.1",
            "CONTENT_TYPE": "application/json" if call.body else "",
            "CONTENT_LENGTH": str(len(call.body)),
            "HTTP_AUTHORIZATION": f"Bearer {self._token}",
            "HTTP_HOST": "localhost",
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(call.body),
            "wsgi.input_terminated": True,
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
            DISCONNECTED_KEY: call.gone,
        }
        return environ


class _Pieces:
    """What an application answers, made in the context that its request was begun in."""

    def __init__(self, context: contextvars.Context, result: Iterable[bytes]) -> None:
        self._context = context
        self._result = result
        self._iterator = iter(result)
        self.first: list[bytes] = []
        self._closed = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self.first:
            return self.first.pop(0)
        return self._context.run(next, self._iterator)

    def close(self) -> None:
        """Safe to call twice."""
        close = None if self._closed else getattr(self._result, "close", None)
        self._closed = True
        if close is not None:
            self._context.run(close)


def _passed_on(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    return {name: value for name, value in headers if name.lower() in PASSED_ON}


class HttpGateway:
    """A server somewhere else. `url` is like http://127.0.0.1:5000; raises `ConfigError` if it is not."""

    def __init__(self, url: str, token: str) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url: {url!r} is not like http://127.0.0.1:5000.")
        self.url = url
        self._host, self._port, self._prefix = parts.hostname, parts.port, parts.path.rstrip("/")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._token = token

    def call(self, call: ApiCall) -> ApiAnswer:
        timeout_s = LOOK_TIMEOUT_S if call.quiet else CONNECT_TIMEOUT_S
        connection = self._connection(timeout_s)
        headers = {"Authorization": f"Bearer {self._token}", "Accept": "*/*"}
        if call.body:
            headers["Content-Type"] = "application/json"
        target = self._prefix + quote(call.path, safe="/:") + (f"?{call.query}" if call.query else "")
        try:
            connection.connect()
            if not call.quiet:
                connection.sock.settimeout(None)  # an answer takes as long as it takes
            connection.request(call.method, target, call.body or None, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise self._silent(error) from error
        pieces = self._pieces(connection, response)
        return ApiAnswer(response.status, _passed_on(response.getheaders()), pieces, connection.close)

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        if self._tls is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)
        return http.client.HTTPSConnection(self._host, self._port, timeout=timeout_s, context=self._tls)

    def _pieces(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> Iterator[bytes]:
        try:
            while piece := response.read1(_PIECE_BYTES):
                yield piece
            if response.length:  # announced, and not sent
                raise http.client.IncompleteRead(b"", response.length)
        except (OSError, http.client.HTTPException) as error:
            raise self._silent(error) from error
        finally:
            with suppress(OSError):
                connection.close()

    def _silent(self, error: Exception) -> UnavailableError:
        return UnavailableError(f"no answer from {self.url}: {str(error) or type(error).__name__}.")
