"""A small client of the HTTP API, for the commands that talk to a running server."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

from core.config import Settings
from core.errors import AuthenticationError, ConfigError, NotFoundError, UnavailableError, VRAMancerError
from core.security.token import is_loopback
from vramancer.web.listener import WILDCARDS

_CONNECT_TIMEOUT_S = 10.0
Client = TypeVar("Client", bound="ApiClient")
_ERRORS: dict[int, type[VRAMancerError]] = {401: AuthenticationError, 404: NotFoundError}


class ApiClient:
    """Requests to one server. Errors come as `VRAMancerError` with the server's own message."""

    def __init__(self, url: str, token: str | None) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url: {url!r} is not like http://127.0.0.1:5000.")
        self.url = url
        self._parts = parts
        self._token = token

    @classmethod
    def for_settings(cls: type[Client], settings: Settings, url: str | None) -> Client:
        """The server at `url`, or the one that these settings would start; with the token that it would use. One that
        was generated on this machine is not sent to another one."""
        at = urlsplit(local_url(settings)).hostname
        client = cls(url or local_url(settings), None)
        host = client._parts.hostname or ""
        client._token = read_token(settings, generated=is_loopback(host) or host == at)
        return client

    def get(self, path: str, *, timeout_s: float | None = None) -> Any:
        """The JSON that GET `path` answers. `timeout_s` bounds each wait, for the connection and for the answer; None:
        ten seconds for the connection alone."""
        with self._request("GET", path, None, timeout_s) as response:
            return self._json(response)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that POST `path` answers, whenever it does."""
        with self._request("POST", path, body) as response:
            return self._json(response)

    def _json(self, response: http.client.HTTPResponse) -> Any:
        try:
            return json.loads(response.read())
        except ValueError as error:
            raise UnavailableError(f"{self.url} answers something other than JSON: no VRAMancer server.") from error

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The events that POST `path` streams, as they come. Closing the iterator closes the connection."""
        with self._request("POST", path, body) as response:
            for line in response:
                name, _, value = line.decode("utf-8").strip().partition(":")
                if name != "data":
                    continue  # a comment that keeps the connection open, or the empty line after an event
                if value.strip() == "[DONE]":
                    return
                event = json.loads(value)
                if "error" in event:
                    raise VRAMancerError(event["error"]["message"])
                yield event
        raise UnavailableError(f"{self.url} ended the stream too early.")

    @contextmanager
    def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        connection = self._connection(timeout_s or _CONNECT_TIMEOUT_S)
        try:
            connection.connect()
            connection.sock.settimeout(timeout_s)  # None: an answer takes as long as it takes
            yield self._exchange(connection, method, path, body)
        except (OSError, http.client.HTTPException) as error:
            raise self._unanswered(error) from error
        finally:
            connection.close()

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        """One that is not connected yet."""
        secure = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        return kind(self._parts.hostname or "", self._parts.port, timeout=timeout_s)

    def _exchange(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: Mapping[str, Any] | None
    ) -> http.client.HTTPResponse:
        """Send a request and read the head of its answer; one of an error is raised."""
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        payload = None
        if body is not None:
            payload, headers["Content-Type"] = json.dumps(body), "application/json"
        connection.request(method, self._parts.path.rstrip("/") + path, payload, headers)
        response = connection.getresponse()
        if response.status >= 400:
            kind_of_error = _ERRORS.get(response.status, VRAMancerError)
            raise kind_of_error(f"{self.url}: {_error_message(response)}")
        return response

    def _unanswered(self, error: Exception) -> UnavailableError:
        return UnavailableError(f"no answer from {self.url}: {str(error) or type(error).__name__}.")


def local_url(settings: Settings) -> str:
    """Where a server that these settings start can be reached from this machine."""
    host = WILDCARDS.get(settings.api.host, settings.api.host)
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{settings.api.port}"


def _error_message(response: http.client.HTTPResponse) -> str:
    text = response.read().decode("utf-8", "replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {response.status} {response.reason}"


def read_token(settings: Settings, *, generated: bool = True) -> str | None:
    """The configured token, or else the one that a server on this machine `generated`, if that may be used; None where
    there is none."""
    if settings.api.token is not None:
        return settings.api.token.get_secret_value()
    if settings.api.token_file is None and not generated:
        return None
    path = settings.api.token_file or settings.runtime.state_dir / "api-token"
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: the token cannot be read: {error.strerror}.") from error
