"""`vramancer status`: what a running server is doing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live

from core.config import Settings
from core.errors import ConfigError, UnavailableError
from vramancer.cli.client import ApiClient
from vramancer.cli.options import settings_command
from vramancer.cli.picture import Facts, picture
from vramancer.cli.terminal import plain_text

_WATCH_S = 1.0


@settings_command("api")
def status(
    settings: Settings,
    url: Annotated[
        str | None, typer.Option("--url", help="The server to ask. Not set: the one at --host and --port.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Draw it again every second, until Ctrl-C.")] = False,
) -> None:
    """Show what a running server does: model, memory of every device, requests, tiers."""
    client = ApiClient.for_settings(settings, url)
    console = Console(highlight=False)
    if watch and as_json:
        raise ConfigError("--watch draws and --json prints: give one of them.")
    if as_json:
        typer.echo(json.dumps(client.get("/api/pipeline/status"), indent=2))
    elif watch:
        watch_status(lambda: ask(client), console)
    else:
        console.print(picture(ask(client), console))


def ask(client: ApiClient) -> Facts:
    """What the server says of itself. Raises `VRAMancerError`."""
    return Facts(
        url=client.url,
        pipeline=client.get("/api/pipeline/status"),
        queue=client.get("/api/queue/status"),
        batcher=client.get("/api/batcher/stats"),
        system=client.get("/api/system"),
    )


def watch_status(
    look: Callable[[], Facts],
    console: Console,
    *,
    interval_s: float = _WATCH_S,
    wait: Callable[[float], Any] = time.sleep,
) -> None:
    """Draw what `look` sees, again and again, until Ctrl-C. A server that goes away is waited for; one that is not
    there from the start is an error. Raises `ConfigError` where nothing can be drawn again."""
    if not console.is_terminal or console.is_dumb_terminal:
        raise ConfigError("--watch draws the picture again and again, which takes a terminal.")
    drawn: RenderableType = picture(look(), console)
    with Live(drawn, console=console, auto_refresh=False, vertical_overflow="crop") as live:
        try:
            while True:
                live.refresh()
                wait(interval_s)
                try:
                    drawn = picture(look(), console)
                    live.update(drawn)
                except UnavailableError as error:
                    live.update(Group(drawn, plain_text(error.message, console, "red")))
        except KeyboardInterrupt:
            return
