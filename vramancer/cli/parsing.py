"""How commands read their arguments and print their help: few flags unless all are asked for, and what was probably
meant by one that does not exist.
"""

from __future__ import annotations

import textwrap
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from core.config import SettingInfo, iter_settings
from core.config_names import ABSENT_COMMANDS, absence, nearest

WRONG_USAGE: type[Exception] = typer.BadParameter.__mro__[1]
"""What typer raises for arguments that it cannot read; it exports only kinds of it."""
HELP_ALL = "help_all"
_INDENT = 6
_OWN = "Options"


class SettingsCommand(TyperCommand):
    """A command with flags for settings. `--help` shows its own flags and the common settings, `--help-all` all."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except WRONG_USAGE as error:
            raise _explained(error, _flags_of(self, ctx)) from None

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Own flags first, then settings by section."""
        groups: dict[str, list[tuple[str, str]]] = {_OWN: []}
        more = 0
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            info = setting_of(parameter)
            if info is None:
                groups[_OWN].append(record)
            elif ctx.meta.get(HELP_ALL) or info.common:
                group = info.key.partition(".")[0].capitalize()
                groups.setdefault(group, []).append((record[0], record[1] if ctx.meta.get(HELP_ALL) else short(info)))
            else:
                more += 1
        for title, records in groups.items():
            if not records:
                continue
            with formatter.section(title):
                if ctx.meta.get(HELP_ALL) and title != _OWN:
                    formatter.write(_spelled_out(records, formatter.width))
                else:
                    formatter.write_dl(records)
        if more:
            formatter.write(f"\n{more} more settings: {ctx.command_path} --help-all\n")


class Commands(TyperGroup):
    """The program: its commands, and what to say of others."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except WRONG_USAGE as error:
            raise _explained(error, _flags_of(self, ctx), any_command=True) from None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Each with the whole first sentence of its help."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.get_short_help_str(1000)) for name, command in self.commands.items()])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if name not in self.commands and not name.startswith("-"):
            if name in ABSENT_COMMANDS:
                ctx.fail(f"{absence(f'vramancer {name}', ABSENT_COMMANDS[name])}.")
            meant = nearest(name, self.commands)
            hint = f"Did you mean {meant!r}?" if meant else f"There are {', '.join(self.commands)}."
            ctx.fail(f"No such command {name!r}. {hint}")
        return super().resolve_command(ctx, args)


def setting_of(parameter: Any) -> SettingInfo | None:
    """The setting that a parameter of a command sets, None if it is the command's own."""
    return next((info for info in iter_settings() if parameter_name(info) == parameter.name), None)


def parameter_name(info: SettingInfo) -> str:
    """Of the parameter that sets it."""
    return "setting_" + info.key.replace(".", "_")


def short(info: SettingInfo) -> str:
    """Its help text where there is little room: what it is, the choices, the default."""
    choices = f"{info.allowed[0].upper()}{info.allowed[1:]}." if info.allowed.startswith("one of") else ""
    default = "" if info.default_text in ("null", "[]") or "Not set:" in info.summary else f"[{info.default_text}]"
    return " ".join(part for part in (info.summary, choices, default) if part)


def details(info: SettingInfo) -> str:
    """The whole help text: the description, and on a line of its own what is allowed, the default, the variable."""
    allowed = f"Allowed: {info.allowed}." if info.allowed else ""
    default = "" if info.default_text in ("null", "[]") else f"Default: {info.default_text}."
    facts = " ".join(part for part in (allowed, default, f"({info.env})") if part)
    return f"{info.description}\n{facts}"


def _spelled_out(records: list[tuple[str, str]], width: int) -> str:
    """Each flag on a line, its help below."""
    lines = []
    for name, text in records:
        lines.append(f"  {name}")
        for paragraph in text.splitlines():
            lines += textwrap.wrap(
                paragraph, width, initial_indent=" " * _INDENT, subsequent_indent=" " * _INDENT, break_on_hyphens=False
            )
    return "\n".join([*lines, ""])


def _flags_of(command: Any, ctx: Any) -> list[str]:
    return [name for parameter in command.get_params(ctx) for name in (*parameter.opts, *parameter.secondary_opts)]


def _explained(error: Exception, flags: list[str], *, any_command: bool = False) -> Exception:
    """The error, saying what was probably meant where a flag is not known."""
    flag, message = getattr(error, "option_name", None), getattr(error, "message", None)
    if flag is None or flag in flags or not isinstance(message, str):
        return error
    keys = {"--" + info.key.replace(".", "-").replace("_", "-"): info.flag for info in iter_settings()}
    meant = keys.get(flag) if keys.get(flag) in flags else None
    meant = meant or nearest(flag, (name for name in flags if name.startswith("--")), prefix="--")
    text = f"No such option: {flag}." + (f" Did you mean {meant}?" if meant else "")
    if any_command and any(info.flag == flag for info in iter_settings()):
        text = f"{flag} comes after a command, as in: vramancer serve {flag} ..."
    vars(error).update(message=text, possibilities=None)
    return error
