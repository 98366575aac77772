"""A master or a worker, made as the settings say."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.config import Settings
from core.errors import ConfigError, OutOfDeviceMemoryError
from core.network.handshake import derive_key
from core.network.interfaces import cluster_address
from core.security.token import Token, resolve_cluster_token

if TYPE_CHECKING:
    from core.cluster.master import Master
    from core.cluster.worker import Worker

_LONGEST_NAME = 63


@dataclass(frozen=True, slots=True)
class OpenMaster:
    """A master that is listening, and the token that its workers need."""

    master: Master
    token: Token


def own_name(settings: Settings) -> str:
    """This machine's in the cluster."""
    plain = re.sub(r"[^A-Za-z0-9.-]+", "-", settings.cluster.name or socket.gethostname()).strip("-.")
    return plain[:_LONGEST_NAME] or "node"


def open_master(settings: Settings, *, version: str) -> OpenMaster | None:
    """None unless workers are accepted. Close it after whatever uses it.

    Raises:
        ConfigError: the token, the interface or the port cannot be had.
    """
    cluster = settings.cluster
    if not cluster.accept:
        return None
    from core.cluster.master import Master

    token, host = resolve_cluster_token(settings, create=True), cluster_address(cluster.interface)
    try:
        master = Master(cluster, derive_key(token.value), version=version, host=host, name=own_name(settings))
    except OSError as error:
        raise ConfigError(
            f"cluster.port: {host}:{cluster.port} cannot be listened on: {error.strerror or error}."
        ) from error
    master.start()
    return OpenMaster(master, token)


def open_worker(settings: Settings, *, version: str) -> Worker:
    """Not running yet. Close it after it has run.

    Raises:
        ConfigError: the token, the interface or the main memory that is offered cannot be had.
        DeviceError: the devices cannot.
    """
    from core.cluster.worker import Worker
    from core.devices import open_devices

    cluster = settings.cluster
    key = derive_key(resolve_cluster_token(settings, create=False).value)
    bound_to = cluster_address(cluster.interface) if cluster.interface is not None else None
    aside = cluster.memory_bytes + (settings.memory.host_bytes or 0)
    devices = open_devices(settings.devices, set_aside_bytes=aside)
    try:
        return Worker(settings, devices, key, version=version, name=own_name(settings), bound_to=bound_to)
    except OutOfDeviceMemoryError as error:
        raise ConfigError(f"cluster.memory_bytes: {error.message}") from error
