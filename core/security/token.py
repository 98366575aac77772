"""The API's token and the cluster's: where each comes from, and what is weak."""

from __future__ import annotations

import ipaddress
import os
import secrets
import stat
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from pydantic import SecretStr

from core.config import Settings
from core.defaults import MIN_CLUSTER_TOKEN_LENGTH
from core.errors import ConfigError

TOKEN_FILE_NAME = "api-token"
CLUSTER_TOKEN_FILE_NAME = "cluster-token"
TOKEN_BYTES = 32
MIN_PRODUCTION_LENGTH = 16


class Token(NamedTuple):
    """A token, whether it was generated just now, and the file that keeps it (None if it came from settings)."""

    value: str
    created: bool
    path: Path | None


def resolve_token(settings: Settings) -> Token:
    """The token to ask API clients for: the one in the settings, else the generated one, made and stored on first use.

    Raises:
        ConfigError: the token is unusable, weak in production mode, or its file cannot be trusted.
    """
    path = settings.api.token_file or settings.runtime.state_dir / TOKEN_FILE_NAME
    token = _resolve(settings.api.token, "api.token (VRM_API_TOKEN)", path, "API token", "VRM_API_TOKEN")
    if settings.security.production and len(token.value) < MIN_PRODUCTION_LENGTH:
        raise ConfigError(
            f"{path if token.path else 'api.token (VRM_API_TOKEN)'}: in production mode the token needs at least "
            f"{MIN_PRODUCTION_LENGTH} characters, got {len(token.value)}."
        )
    return token


def resolve_cluster_token(settings: Settings, *, create: bool) -> Token:
    """The token that the nodes of a cluster share: the one in the settings, else the one in the file. With `create`,
    as for a master, it is made on first use.

    Raises:
        ConfigError: there is none, it is unusable or short, or its file cannot be trusted.
    """
    cluster, variable = settings.cluster, "VRM_CLUSTER_TOKEN"
    path = cluster.token_file or settings.runtime.state_dir / CLUSTER_TOKEN_FILE_NAME
    if cluster.token is None and not create and not path.exists():
        raise ConfigError(
            f"no cluster token: set {variable} to the one that the master shows and keeps, or copy its file to {path}."
        )
    source = f"cluster.token ({variable})"
    token = _resolve(cluster.token, source, path, "cluster's token", variable)
    if len(token.value) < MIN_CLUSTER_TOKEN_LENGTH:
        raise ConfigError(
            f"{path if token.path else source}: the token needs at least {MIN_CLUSTER_TOKEN_LENGTH} characters, got "
            f"{len(token.value)}."
        )
    return token


def _resolve(explicit: SecretStr | None, source: str, path: Path, what: str, variable: str) -> Token:
    if explicit is not None:
        token = explicit.get_secret_value()
        _check_token(token, source)
        return Token(token, False, None)
    created = not path.exists() and _create(path, what, variable)
    token = _read(path, what)
    _check_token(token, str(path))
    return Token(token, created, path)


def check_bind(settings: Settings) -> None:
    """Raise `ConfigError` when the API would be reachable from other machines without a token that was chosen."""
    if settings.api.token is None and not is_loopback(settings.api.host):
        raise ConfigError(
            f"api.host: {settings.api.host} is reachable from other machines, so a token has to be set: "
            "give one in VRM_API_TOKEN or api.token, or listen on 127.0.0.1."
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. Names other than localhost count as reachable from outside."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _check_token(token: str, source: str) -> None:
    if not token or not all("!" <= char <= "~" for char in token):
        raise ConfigError(f"{source}: the token must be printable ASCII without spaces, and not empty.")


def _create(path: Path, what: str, variable: str) -> bool:
    """Write a new token readable by its owner alone. False when another process was first."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Written under another name and then linked, so that no reader ever sees half a token.
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(secrets.token_urlsafe(TOKEN_BYTES) + "\n")
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            Path(temporary).unlink()
    except OSError as error:
        raise ConfigError(
            f"{path}: the generated {what} cannot be stored ({error.strerror}); set {variable} instead."
        ) from error
    return True


def _read(path: Path, what: str) -> str:
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the {what} cannot be read: {error}.") from error
    if sys.platform != "win32" and stat.S_IMODE(mode) & 0o077:
        raise ConfigError(
            f"{path}: other users may read this {what}. Delete the file to get a new token, or run: chmod 600 {path}"
        )
    return text.strip()
