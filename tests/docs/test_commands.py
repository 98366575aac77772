"""Every `vramancer` command line of the pages is one that the program takes, and every flag that they name is there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from doc_pages import REPOSITORY, blocks, inline_code, pages, shell_lines

from core.config_names import ABSENT_COMMANDS
from vramancer.cli import app
from vramancer.cli.parsing import WRONG_USAGE
from vramancer.main import as_command

PAGES = {str(page.relative_to(REPOSITORY)): page for page in pages()}
PROGRAM: Any = typer.main.get_command(app)
SHELLS = {"sh", "bash", "console"}
PRINTING = {"--help", "--help-all", "--version"}
"""Flags at which the program prints and ends."""
OTHER_FLAGS = {"--index-url", "--gpus"}
"""Flags of pip and docker that stand in running text."""
MEANING_A_COMMAND = {"--api", "--cluster-worker"}
OTHER_PROGRAMS = ("benchmarks", "core/models/demo")
"""Pages whose flags are those of programs beside `vramancer`."""


def command_lines(text: str, *, shell: bool) -> Iterator[list[str]]:
    """The arguments of each call of the program in a line of text; `shell`: in a block of command lines."""
    for line in shell_lines(text) if shell else [text]:
        parts = shlex.split(line, comments=True) if shell or line.startswith("vramancer ") else []
        for start, word in enumerate(parts):
            module = word == "-m" and parts[start + 1 : start + 2] == ["vramancer.main"]
            called = word == "vramancer" and (start == 0 or parts[start - 1] in ("&&", "|", ";"))
            if not (called or module):
                continue
            rest = parts[start + 1 + module :]
            ends = [index for index, part in enumerate(rest) if re.fullmatch(r"[&|;]+|\d?[<>]+", part)]
            yield rest[: min(ends, default=len(rest))]


def commands_of(name: str) -> list[list[str]]:
    page = PAGES[name]
    found = [
        arguments for block in blocks(page) if block.language in SHELLS
        for arguments in command_lines(block.text, shell=True)
    ]  # fmt: skip
    for code in inline_code(page.read_text(encoding="utf-8")):
        found += command_lines(code, shell=False)
    return found


def parse(arguments: list[str]) -> None:
    """Reads a command line as the program does, and runs nothing. Raises what the program answers a wrong one with."""
    arguments = as_command(arguments)
    group = PROGRAM.make_context("vramancer", [*arguments], resilient_parsing=not arguments)
    if not arguments:
        return
    command_name, command, rest = PROGRAM.resolve_command(group, [*group._protected_args, *group.args])
    if command_name == "bench":
        return  # its arguments are the benchmark's own
    context = command.make_context(command_name, rest, parent=group)
    if command_name == "cluster":
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("name", PAGES)
def test_command_lines_are_taken(name: str) -> None:
    for arguments in commands_of(name):
        if arguments[:1] and arguments[0] in ABSENT_COMMANDS:
            continue  # said not to be there
        try:
            parse([argument for argument in arguments if argument not in PRINTING])
        except WRONG_USAGE as error:
            pytest.fail(f"vramancer {shlex.join(arguments)}: {error}")


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--modle", "a"],
        ["serv"],
        ["plan", "--gpu"],
        ["--api", "--prot", "1"],
        ["cluster", "joim"],
        ["--cluster-worker", "--port", "1"],
    ],
)
def test_a_wrong_command_line_is_found(arguments: list[str]) -> None:
    with pytest.raises(WRONG_USAGE):
        parse(arguments)


def test_command_lines_are_found_in_text() -> None:
    text = (
        "cat a | vramancer run 'b c' # d\nvramancer serve \\\n  --port 1 2> log\npython -m vramancer.main --api && b\n"
    )
    found = [["run", "b c"], ["serve", "--port", "1"], ["--api"]]
    assert list(command_lines(text, shell=True)) == found
    assert list(command_lines("vramancer plan MODEL", shell=False)) == [["plan", "MODEL"]]
    assert not list(command_lines("vramancer/web", shell=False))
    assert sum(len(commands_of(name)) for name in PAGES) > 30, "the pages are read"


@pytest.mark.parametrize("name", [name for name in PAGES if not name.startswith(OTHER_PROGRAMS)])
def test_flags_that_are_named_exist(name: str) -> None:
    commands = [*PROGRAM.commands.values(), *PROGRAM.commands["cluster"].commands.values()]
    parameters = [parameter for command in commands for parameter in command.params]
    known = {flag for parameter in parameters for flag in (*parameter.opts, *parameter.secondary_opts)}
    code = inline_code(PAGES[name].read_text(encoding="utf-8"))
    named = {match[1] for text in code for match in re.finditer(r"^(--[a-z][\w-]*)", text)}
    assert named <= known | PRINTING | OTHER_FLAGS | MEANING_A_COMMAND


@pytest.mark.parametrize("name", PAGES)
def test_the_torch_that_is_named_is_the_pinned_one(name: str) -> None:
    pinned = re.search(r"^torch==(\S+)$", (REPOSITORY / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None
    installed = re.findall(r"pip install .*\btorch==([\d.]+)", PAGES[name].read_text(encoding="utf-8"))
    assert set(installed) <= {pinned[1]}
