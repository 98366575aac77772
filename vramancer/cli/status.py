"""`vramancer status`: what a running server is doing."""

from __future__ import annotations

import json
from typing import Annotated

import typer
import yaml

from core.config import Settings
from vramancer.cli.client import ApiClient
from vramancer.cli.options import settings_command


@settings_command("api")
def status(
    settings: Settings,
    url: Annotated[
        str | None, typer.Option("--url", help="The server to ask. Not set: the one at --host and --port.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the state of a running server."""
    state = ApiClient.for_settings(settings, url).get("/api/pipeline/status")
    typer.echo(json.dumps(state, indent=2) if as_json else yaml.safe_dump(state, sort_keys=False).rstrip("\n"))
