"""The server's own socket: bound before the model loads, listening once it has."""

from __future__ import annotations

import errno
import http.client
import json
import socket
import sys

from core.errors import ConfigError, PortInUseError

WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}
"""Where a server that listens on every interface is reached from the same machine."""
_ASK_TIMEOUT_S = 1.0
_LONGEST_ANSWER = 1 << 16


def bind_socket(host: str, port: int) -> socket.socket:
    """A TCP socket bound to the API's address and not yet listening; port 0 takes a free one.

    Raises:
        PortInUseError: another program listens there; says which, if it is a server like this one.
        ConfigError: the address cannot be had.
    """
    try:
        return bind_address(host, port)
    except OSError as error:
        raise _address_error(host, port, error) from error


def bind_address(host: str, port: int) -> socket.socket:
    """A TCP socket bound to an address. Raises `OSError`, and `ConfigError` for a host that is none of this machine."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(f"api.host: {host!r} is not an address of this machine: {error.strerror}.") from error
    listener = socket.socket(family, kind, protocol)
    try:
        if sys.platform != "win32":  # there it would let two servers share the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def listen(listener: socket.socket, backlog: int) -> None:
    """Start to accept connections on a bound socket. Raises `PortInUseError` if another program was faster."""
    try:
        listener.listen(backlog)
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise _address_error(host, port, error) from error


def _address_error(host: str, port: int, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return PortInUseError(
            f"api.port: {host}:{port} is in use by {_who_listens(host, port)}; choose another with --port."
        )
    return ConfigError(f"api.host: cannot listen on {host}:{port}: {error.strerror}.")


def _who_listens(host: str, port: int) -> str:
    """Another server of ours answers `/health` with its checks, whatever its health is."""
    connection = http.client.HTTPConnection(WILDCARDS.get(host, host), port, timeout=_ASK_TIMEOUT_S)
    try:
        connection.request("GET", "/health")
        answer = json.loads(connection.getresponse().read(_LONGEST_ANSWER))
    except (OSError, http.client.HTTPException, ValueError):
        return "another program"
    finally:
        connection.close()
    checks = answer.get("checks") if isinstance(answer, dict) else None
    ours = isinstance(checks, dict) and "engine" in checks
    return "another VRAMancer server, which answers on /health" if ours else "another program"
