"""`vramancer dashboard --web`: the dashboard for browsers in a process of its own."""

from __future__ import annotations

import socket
from typing import Any

import typer

from core.config import Settings
from core.errors import ConfigError


def serve_web(settings: Settings, url: str | None) -> int:
    """Serve the dashboard of the server at `url` until Ctrl-C. Returns the exit status.

    Raises `ConfigError` without that server's token, or where others could reach the dashboard by accident.
    """
    from core.logs import configure_logging
    from core.security.access import CallerLimits
    from core.security.token import is_loopback
    from dashboard import Dashboard, HttpGateway
    from dashboard.standalone import admission_of, create_standalone_app
    from vramancer import __version__
    from vramancer.cli.client import ApiClient, local_url
    from vramancer.web.limits import Limits
    from vramancer.web.listener import listen
    from vramancer.web.server import FrontDoor

    token = ApiClient.for_settings(settings, url).token
    if token is None:
        raise ConfigError("There is no token for that server: set VRM_API_TOKEN to its own.")
    host = settings.dashboard.host
    if settings.api.token is None and not is_loopback(host):
        raise ConfigError(
            f"dashboard.host: {host} is reachable from other machines, so a token has to be set: give the server's own "
            "in VRM_API_TOKEN, or listen on 127.0.0.1."
        )
    configure_logging(settings.logging)
    shown = url or local_url(settings)
    board = Dashboard(
        HttpGateway(shown, token),
        settings.dashboard,
        bound_to=host,
        max_body_bytes=settings.api.max_body_bytes,
        version=__version__,
    )
    callers = None if settings.security.disable_rate_limit else CallerLimits(settings.security.requests_per_minute)
    app = create_standalone_app(board, token, callers)
    limits = Limits.of(settings.api, settings.dashboard.max_viewers)
    with _bound(host, settings.dashboard.port) as listener:
        listen(listener, limits.max_connections)
        text = f"dashboard of {shown} at http://{_address(listener.getsockname())}/dashboard\nCtrl-C ends it"
        door = FrontDoor(app, admission_of(app, board, token), limits, lambda: typer.echo(text), board.live)
        door.run_until_stopped(listener)
    return 0


def _bound(host: str, port: int) -> socket.socket:
    from vramancer.web.listener import bind_address

    try:
        return bind_address(host, port)
    except OSError as error:
        raise ConfigError(
            f"dashboard.port: cannot listen on {host}:{port}: {error.strerror}; choose another with --dashboard-port."
        ) from error


def _address(name: tuple[Any, ...]) -> str:
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
