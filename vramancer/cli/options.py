"""Flags for settings: one per setting, made from `core.config`, so that help, YAML and environment never differ."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from core.config import SettingInfo, iter_settings, load_settings
from core.errors import ConfigError, VRAMancerError
from vramancer.cli.parsing import HELP_ALL, details, parameter_name

Section = Literal[
    "model", "devices", "engine", "lending", "memory", "backend", "api", "security", "cluster", "monitoring",
    "dashboard", "tracing", "logging", "runtime", "embeddings",
]  # fmt: skip
_CONFIG = "config"
_MODEL = "model_argument"


def settings_command(
    *sections: Section,
    model_argument: bool = False,
    model_from: Callable[[dict[str, Any]], str | None] | None = None,
    without: Collection[str] = (),
) -> Callable[..., Callable[..., None]]:
    """Turn `command(settings, ...)` into one that takes a flag for every setting of `sections`, but for the keys
    in `without`.

    With `model_argument` it takes a MODEL; `model_from` finds one among arguments that the command has of its own.
    The command's further parameters stay typer's; what it returns is the exit status (None: 0). Our own errors end
    the program with their message: status 2 for a wrong setting, 1 otherwise.
    """

    def decorate(command: Callable[..., int | None]) -> Callable[..., None]:
        infos = [
            info
            for info in iter_settings()
            if info.key.split(".")[0] in sections and info.flag and info.key not in without
        ]

        def run(**arguments: Any) -> None:
            arguments.pop(HELP_ALL)
            given = {info.key: arguments.pop(parameter_name(info)) for info in infos}
            overrides = {key: value for key, value in given.items() if value is not None}
            try:
                _take_model(arguments.pop(_MODEL, None), overrides)
                config_file = arguments.pop(_CONFIG)
                if model_from is not None:
                    _take_model(model_from(arguments), overrides)
                settings = load_settings(config_file=config_file, overrides=overrides)
                status = command(settings, **arguments)
            except VRAMancerError as error:
                fail(error.message, status=2 if isinstance(error, ConfigError) else 1)
            raise typer.Exit(status or 0)

        run.__name__ = command.__name__
        run.__doc__ = command.__doc__
        run.__annotations__ = {}
        setattr(run, "__signature__", _signature(command, infos, model_argument))  # noqa: B010 (mypy has no such attribute)
        return run

    return decorate


def fail(message: str, *, status: int = 1) -> None:
    """Say what is wrong on standard error, in red where there are colours, and exit with `status`."""
    console = Console(stderr=True, highlight=False)
    for line in message.splitlines():
        console.print(f"error: {line}", style="red", markup=False, soft_wrap=True)
    raise typer.Exit(status)


def _take_model(argument: str | None, overrides: dict[str, Any]) -> None:
    if argument is None:
        return
    if "model.name" in overrides:
        raise ConfigError(f"the model is given twice: {argument!r} and --model {overrides['model.name']!r}.")
    overrides["model.name"] = argument


def _signature(command: Callable[..., Any], infos: list[SettingInfo], model_argument: bool) -> inspect.Signature:
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]  # without `settings`
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in [*own, *map(_option, infos)]]
    if model_argument:
        kind = Annotated[str | None, typer.Argument(metavar="MODEL", help="The same as --model.")]
        parameters.insert(0, _keyword(_MODEL, kind))
    config = Annotated[Path | None, typer.Option("--config", metavar="PATH", help="Settings file to read.")]
    parameters.append(_keyword(_CONFIG, config))
    everything = typer.Option("--help-all", help="Show every flag.", callback=_show_all, is_eager=True)
    parameters.append(_keyword(HELP_ALL, Annotated[bool, everything], default=False))
    return inspect.Signature(parameters)


def _show_all(context: typer.Context, wanted: bool) -> None:
    if wanted:
        context.meta[HELP_ALL] = True
        typer.echo(context.get_help())
        raise typer.Exit


def _option(info: SettingInfo) -> inspect.Parameter:
    if bool in info.kinds:
        names = f"{info.flag}/--no-{(info.flag or '').removeprefix('--')}"
        switch = typer.Option(names, help=details(info))
        return _keyword(parameter_name(info), Annotated[bool | None, switch])
    option = typer.Option(info.flag, help=details(info), metavar=_metavar(info))
    return _keyword(parameter_name(info), Annotated[str | None, option])


def _keyword(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _metavar(info: SettingInfo) -> str:
    for kind, word in ((int, "INTEGER"), (float, "NUMBER"), (Path, "PATH"), (tuple, "A,B,...")):
        if kind in info.kinds:
            return word
    return "TEXT"
