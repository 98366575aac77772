"""The subcommands. Heavy modules are imported by the command that needs them, so that `--help` is quick."""

from __future__ import annotations

from typing import Annotated

import typer

from vramancer import __version__
from vramancer.cli.bench import bench
from vramancer.cli.chat import run
from vramancer.cli.cluster import cluster
from vramancer.cli.doctor import doctor
from vramancer.cli.live import dashboard
from vramancer.cli.parsing import Commands, SettingsCommand
from vramancer.cli.plan import plan
from vramancer.cli.serve import serve
from vramancer.cli.status import status

app = typer.Typer(
    cls=Commands,
    suggest_commands=False,
    rich_markup_mode=None,  # boxes leave the texts of flags half a line
    help="Run one large language model across GPUs that do not match, behind an OpenAI-compatible API.",
    epilog="`python -m vramancer.main --api` is `vramancer serve`, `--cluster-worker` is `vramancer cluster join`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (serve, run, plan, doctor, status, dashboard):
    app.command(cls=SettingsCommand)(command)
app.add_typer(cluster, name="cluster")
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)(bench)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vramancer {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """The flags that come before a command."""
