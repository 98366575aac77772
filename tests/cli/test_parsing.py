"""Help that can be read at 80 columns, and what is said of flags and commands that do not exist."""

from __future__ import annotations

import re
from typing import Any

import pytest
from typer.testing import CliRunner

from core.config import iter_settings
from core.config_names import ABSENT_COMMANDS
from vramancer.cli import app
from vramancer.cli.parsing import details, short

COMMANDS = ("serve", "run", "plan", "doctor", "status", "cluster join", "cluster status")
OF_WORKERS = ("cluster.master", "cluster.worker_port", "cluster.memory_bytes")


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), prog_name="vramancer", env={"COLUMNS": "80", "TERM": "dumb"})


def shown_flags(text: str) -> set[str]:
    return set(re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "--help-all", "-h"])
def test_help_fits_into_80_columns(command: str, flag: str) -> None:
    result = invoke(*command.split(), flag)
    assert result.exit_code == 0
    assert max(map(len, result.output.splitlines())) <= 80
    assert "\x1b" not in result.output


def test_help_shows_the_common_settings_alone_and_help_all_every_one() -> None:
    infos = [info for info in iter_settings() if info.flag and info.key not in OF_WORKERS]
    common = {info.flag for info in infos if info.common}
    assert 10 <= len(common) <= 17, "a dozen or so"
    few, every = invoke("serve", "--help").output, invoke("serve", "--help-all").output
    settings = {info.flag for info in infos}
    assert shown_flags(few) & settings == common
    assert shown_flags(every) >= settings
    assert f"{len(settings - common)} more settings: vramancer serve --help-all" in few
    assert "more settings" not in every


def test_common_settings_are_told_in_a_line_or_few() -> None:
    for info in iter_settings():
        if info.common:
            assert len(short(info)) < 200
            assert info.env not in invoke("serve", "--help").output


def test_short_help_has_what_decides() -> None:
    text = " ".join(invoke("serve", "--help").output.split())
    for said in ("[5000]", "[127.0.0.1]", "One of auto, off.", "Not set: what the model was made for.", "or the next"):
        assert said in text


@pytest.mark.parametrize(
    ("key", "facts"),
    [
        ("api.port", "Allowed: at least 0 and at most 65535. Default: 5000. (VRM_API_PORT)"),
        ("devices.num_gpus", "Allowed: at least 1. (VRM_DEVICES_NUM_GPUS)"),
        ("api.host", "Default: 127.0.0.1. (VRM_API_HOST)"),
        ("model.name", "(VRM_MODEL_NAME)"),
    ],
)
def test_whole_help_ends_with_what_is_allowed_the_default_and_the_variable(key: str, facts: str) -> None:
    info = next(info for info in iter_settings() if info.key == key)
    assert details(info) == f"{info.description}\n{facts}"


def test_own_flags_come_first_then_settings_by_section() -> None:
    text = invoke("plan", "--help").output
    places = [text.index(title) for title in ("Options:", "--gpu", "--help-all", "Model:", "Devices:", "Engine:")]
    assert places == sorted(places)
    assert "Api:" not in text, "a plan does not listen"


def test_a_flag_that_help_leaves_out_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("vramancer.server.serve", lambda settings: seen.append(settings) or 0)
    assert "--block-size" not in invoke("serve", "--help").output
    assert invoke("serve", "--block-size", "32").exit_code == 0
    assert seen[0].engine.block_size == 32


def test_the_program_lists_its_commands_in_whole_sentences() -> None:
    text = invoke("--help").output
    names = {*(name.split()[0] for name in COMMANDS), "bench"}
    assert all(re.search(rf"^  {name} ", text, re.MULTILINE) for name in names)
    assert "..." not in text.partition("Commands:")[2]
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (("serve", "--prot", "1"), "--port"),
        (("serve", "--prot=1"), "--port"),
        (("serve", "--api-port", "1"), "--port"),  # as in YAML
        (("serve", "--model-name", "x"), "--model"),
        (("serve", "--help-al"), "--help-all"),
        (("plan", "--mor", "3090"), "--more"),
        (("plna",), "'plan'"),
        (("sevre", "some/model"), "'serve'"),
    ],
)
def test_slips_are_understood(arguments: tuple[str, ...], meant: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert f"Did you mean {meant}?" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "arguments",
    [("serve", "--temperature", "1"), ("plan", "--port", "1"), ("status", "--prot", "1", "--x"), ("chat",), ("start",)],
)
def test_there_are_no_wild_guesses(arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Possible options" not in result.output
    meant = re.findall(r"Did you mean (\S+)\?", result.output)
    assert meant in ([], ["--port"]) and (not meant or "--prot" in arguments)


def test_an_unknown_command_names_those_that_there_are() -> None:
    assert "There are serve, run, plan" in invoke("chat").output


def test_a_setting_before_the_command_is_told_where_it_belongs() -> None:
    assert "--port comes after a command" in invoke("--port", "1", "serve").output


@pytest.mark.parametrize("name", ABSENT_COMMANDS)
def test_commands_that_are_not_in_this_version(name: str) -> None:
    result = invoke(name, "--whatever")
    assert result.exit_code == 2
    assert f"vramancer {name} ({ABSENT_COMMANDS[name]}) is not in this version." in " ".join(result.output.split())
    assert name not in {command.name for command in app.registered_commands}


def test_a_flag_without_its_value_is_not_called_unknown() -> None:
    result = invoke("serve", "--port")
    assert result.exit_code == 2
    assert "requires an argument" in result.output and "No such option" not in result.output
