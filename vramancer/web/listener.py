"""The server's own socket: bound before the model loads, listening once it has."""

from __future__ import annotations

import errno
import socket
import sys

from core.errors import ConfigError


def bind_socket(host: str, port: int) -> socket.socket:
    """A TCP socket bound to the address and not yet listening; port 0 takes a free one.

    Raises:
        ConfigError: the address cannot be had.
    """
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
    except OSError as error:
        listener.close()
        raise _address_error(host, port, error) from error
    return listener


def listen(listener: socket.socket, backlog: int) -> None:
    """Start to accept connections on a bound socket. Raises `ConfigError` if another program was faster."""
    try:
        listener.listen(backlog)
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise _address_error(host, port, error) from error


def _address_error(host: str, port: int, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(f"api.port: {host}:{port} is in use by another program; choose another with --port.")
    return ConfigError(f"api.host: cannot listen on {host}:{port}: {error.strerror}.")
