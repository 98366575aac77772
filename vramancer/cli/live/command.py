"""The command `vramancer dashboard`."""

from __future__ import annotations

import math
import sys
from typing import Annotated

import typer
from rich.console import Console

from core.config import Settings
from core.errors import AuthenticationError, ConfigError, UnavailableError
from vramancer.cli.options import settings_command

_INTERVAL_S = 1.0


@settings_command("api", "dashboard", "security", "logging")
def dashboard(
    settings: Settings,
    url: Annotated[
        str | None, typer.Option("--url", help="The server to watch. Not set: the one at --host and --port.")
    ] = None,
    interval_s: Annotated[
        float,
        typer.Option("--interval", min=0.2, max=3600.0, help="Seconds from one look to the next, in the terminal."),
    ] = _INTERVAL_S,
    web: Annotated[
        bool, typer.Option("--web", help="Serve it for browsers instead, at --dashboard-host and --dashboard-port.")
    ] = False,
) -> int:
    """Watch a running server: speed, latency, memory of every device, stages, requests.

    1 to 4 turn to the pages, ? shows all keys, q leaves.
    """
    if math.isnan(interval_s):
        raise ConfigError("--interval is a number of seconds from 0.2 to 3600.")
    if not web:
        return _in_the_terminal(settings, url, interval_s)
    if interval_s != _INTERVAL_S:
        raise ConfigError("--interval is for the dashboard in the terminal; for browsers (--web) it is a second.")
    from vramancer.cli.web_dashboard import serve_web

    return serve_web(settings, url)


def _in_the_terminal(settings: Settings, url: str | None, interval_s: float) -> int:
    console = Console(highlight=False)
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or console.is_dumb_terminal:
        raise ConfigError(
            "the dashboard takes a terminal that can be drawn on, for input and output: vramancer status prints what "
            "the server does, vramancer status --json does so for programs."
        )
    from vramancer.cli.live.connection import KeptClient
    from vramancer.cli.live.screen import Screen
    from vramancer.cli.live.watch import Watcher

    try:
        watcher = Watcher(lambda: KeptClient.for_settings(settings, url), interval_s)
    except AuthenticationError as error:
        raise AuthenticationError(f"{error.message} Set VRM_API_TOKEN to the token of that server.") from error
    except UnavailableError as error:
        raise UnavailableError(
            f"{error.message} vramancer serve starts a server; --url watches one elsewhere."
        ) from error
    return Screen(watcher, console, interval_s).run()
