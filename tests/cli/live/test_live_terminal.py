"""`vramancer dashboard` as a program: what it asks of a terminal and of a server, and how it leaves."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli.live.live_cases import colors_in, fill
from steering import until
from typer.testing import CliRunner

from vramancer.cli import app

pytest.importorskip("fcntl", reason="POSIX terminals")

from cli.terminal_program import TerminalProgram

LEFT = "\x1b[?1049l"


@pytest.fixture
def start(tmp_path: Path, server: Any) -> Iterator[Any]:
    """Starts the program, with the token in its environment."""
    fill(server)
    programs: list[TerminalProgram] = []

    def begin(*flags: str, **variables: str) -> TerminalProgram:
        program = TerminalProgram(
            tmp_path, "dashboard", "--url", server.url, *flags, variables={"VRM_API_TOKEN": "secret", **variables}
        )
        programs.append(program)
        return program

    yield begin
    for program in programs:
        program.close()


def shown(program: TerminalProgram, text: str) -> None:
    until(lambda: program.shows(text) or program.ended(), f"{text!r} on the screen:\n{program.text}")
    assert program.shows(text), program.text


def ended(program: TerminalProgram) -> int:
    until(program.ended, f"the end:\n{program.text}")
    return program.process.wait()


def unbroken(program: TerminalProgram) -> str:
    """The screen, of which the first lines are full."""
    return "".join(line.ljust(80) for line in program.text.splitlines())


def test_a_session(start: Any, server: Any) -> None:
    program = start("--interval", "0.2")
    shown(program, "[1 overview]")
    assert colors_in(program.written)
    fill(server, 5.0)
    shown(program, " peak ")
    program.type("2")
    shown(program, "[2 devices]")
    program.resize(60, 24)
    until(lambda: program.look() or max(map(len, program.text.splitlines())) <= 60, "a narrower picture")
    shown(program, "[2 devices]")
    program.type("q")
    assert ended(program) == 0
    assert LEFT in program.written
    assert program.attributes() == program.before
    assert not program.text.strip()


def test_no_colours_where_they_are_unwanted(start: Any) -> None:
    program = start(NO_COLOR="1")
    shown(program, "[1 overview]")
    program.type("q")
    assert ended(program) == 0
    assert not colors_in(program.written)


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 0)])
def test_signals_give_the_terminal_back(start: Any, name: str, status: int) -> None:
    program = start()
    shown(program, "Space pauses")
    program.process.send_signal(getattr(signal, name))
    assert ended(program) == status
    assert program.attributes() == program.before


def test_ctrl_c_leaves(start: Any) -> None:
    program = start()
    shown(program, "Space pauses")
    program.type("\x03")
    assert ended(program) == 0
    assert program.attributes() == program.before


def test_a_connection_that_breaks_ends_it(start: Any) -> None:
    program = start()
    shown(program, "Space pauses")
    program.hang_up()
    assert program.process.wait(120) != 0


def test_a_wrong_token_is_said_before_the_screen_is_taken(start: Any, server: Any) -> None:
    server.answers["/api/pipeline/status"] = (401, b'{"error": {"message": "The API token is wrong."}}')
    program = start()
    assert ended(program) == 1
    assert "The API token is wrong. Set VRM_API_TOKEN to the token of that server." in unbroken(program)
    assert "\x1b[?1049h" not in program.written


def test_a_server_that_is_not_there_is_an_error_with_advice(start: Any, server: Any) -> None:
    server.server_close()
    program = start()
    assert ended(program) == 1
    assert f"no answer from {server.url}" in unbroken(program)
    assert "vramancer serve starts a server; --url watches one elsewhere." in unbroken(program)
    assert "\x1b[?1049h" not in program.written


def test_a_terminal_that_cannot_be_drawn_on(start: Any) -> None:
    program = start(TERM="dumb")
    assert ended(program) == 2
    assert "vramancer status prints" in unbroken(program)
    assert "\x1b[?" not in program.written


@pytest.mark.usefixtures("environment")
def test_without_a_terminal_the_other_command_is_named(server: Any) -> None:
    fill(server)
    result = CliRunner().invoke(app, ["dashboard", "--url", server.url])
    assert result.exit_code == 2
    assert "the dashboard takes a terminal" in result.stderr
    assert "vramancer status prints" in result.stderr
    assert not server.seen
    assert not result.stdout


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("interval", ["0", "0.1", "often", "3601", "nan"])
def test_an_interval_has_bounds(interval: str) -> None:
    result = CliRunner().invoke(app, ["dashboard", "--interval", interval])
    assert result.exit_code == 2
    assert "'--interval'" in result.stderr


def test_help_does_not_load_what_draws() -> None:
    """Every command pays for what is imported here."""
    import subprocess

    code = (
        "import sys, vramancer.cli; "
        "print([name for name in sys.modules if name.startswith(('prompt_toolkit', 'vramancer.cli.live.'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['vramancer.cli.live.command']"
