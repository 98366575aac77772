"""Flags become settings; mistakes become one line and an exit status."""

from __future__ import annotations

import io
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from core.config import Settings, iter_settings
from core.errors import CheckpointError
from vramancer import __version__
from vramancer.cli import app
from vramancer.cli.options import fail, settings_command
from vramancer.main import as_command, main

SECTIONS = ("model", "devices", "engine", "lending", "memory", "api", "security", "logging", "runtime")


@pytest.fixture(autouse=True)
def no_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variables and no files from outside."""
    for info in iter_settings():
        monkeypatch.delenv(info.env, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.chdir(tmp_path)


class Probe:
    """A program with one command that keeps the settings it was given."""

    def __init__(self, *sections: Any, result: int | Exception | None = None) -> None:
        self.settings: Settings | None = None
        self.app = typer.Typer()

        @self.app.command()
        @settings_command(*(sections or SECTIONS), model_argument=True)
        def command(settings: Settings) -> int | None:
            self.settings = settings
            if isinstance(result, Exception):
                raise result
            return result

    def run(self, *arguments: str) -> Any:
        return CliRunner().invoke(self.app, list(arguments), env={"COLUMNS": "200"})

    def settings_for(self, *arguments: str) -> Settings:
        result = self.run(*arguments)
        assert result.exit_code == 0, result.output
        assert self.settings is not None
        return self.settings


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_without_flags_the_settings_are_the_defaults() -> None:
    settings = Probe().settings_for()
    assert settings.api == Settings().api
    assert settings.engine == Settings().engine


def test_flags_of_every_kind() -> None:
    settings = Probe().settings_for(
        *("--port", "81", "--breaker-reset-s", "2.5", "--dtype", "float32", "--served-model-name", "a,b"),
        *("--chat-template", "x.jinja", "--log-json", "--no-enable-prefix-caching", "--devices", "cpu=1GiB,cpu=2GiB"),
    )
    assert settings.api.port == 81
    assert settings.engine.breaker_reset_s == 2.5
    assert settings.model.dtype == "float32"
    assert settings.model.served_model_name == ("a", "b")
    assert settings.model.chat_template == Path("x.jinja")
    assert settings.logging.json_output
    assert not settings.engine.enable_prefix_caching
    assert settings.devices.devices == "cpu=1GiB,cpu=2GiB"


def test_flags_win_over_environment_and_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("api: {port: 1, threads: 3}\nengine: {native_kernels: false}\n")
    monkeypatch.setenv("VRM_API_PORT", "2")
    assert Probe().settings_for("--config", str(path)).api.port == 2
    settings = Probe().settings_for("--config", str(path), "--port", "4")
    assert (settings.api.port, settings.api.threads, settings.engine.native_kernels) == (4, 3, False)


def test_the_model_may_be_an_argument_or_a_flag_but_not_both() -> None:
    assert Probe().settings_for("some/model").model.name == "some/model"
    assert Probe().settings_for("--model", "some/model").model.name == "some/model"
    result = Probe().run("a/b", "--model", "c/d")
    assert result.exit_code == 2
    assert "given twice" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--port", "many"), "--port: api.port: Input should be a valid integer"),
        (("--port", "70000"), "at most 65535"),
        (("--dtype", "int8"), "auto, bfloat16, float16, float32"),
        (("--config", "nowhere.yaml"), "nowhere.yaml: cannot be read"),
    ],
)
def test_a_wrong_setting_is_one_line_and_status_2(arguments: tuple[str, ...], said: str) -> None:
    result = Probe().run(*arguments)
    assert result.exit_code == 2
    assert said in result.output
    assert "Traceback" not in result.output


def test_other_errors_of_ours_are_one_line_and_status_1() -> None:
    result = Probe(result=CheckpointError("model.safetensors is cut off.")).run()
    assert result.exit_code == 1
    assert plain(result.output).strip() == "error: model.safetensors is cut off."


def test_a_command_may_choose_its_status() -> None:
    assert Probe(result=7).run().exit_code == 7


def test_a_command_takes_the_flags_of_its_sections_only() -> None:
    probe = Probe("model")
    assert probe.run("--dtype", "float16").exit_code == 0
    assert probe.run("--port", "1").exit_code == 2


OF_WORKERS = ("cluster.master", "cluster.worker_port", "cluster.memory_bytes")


def test_help_all_shows_every_flag_with_default_and_variable() -> None:
    result = CliRunner().invoke(app, ["serve", "--help-all"], env={"COLUMNS": "400", "TERM": "dumb"})
    text = plain(result.output)
    for info in iter_settings():
        if info.flag is None:
            assert "--token " not in text  # secrets would show in the list of processes
            continue
        if info.key not in OF_WORKERS:
            assert f"{info.flag} " in text
            assert info.env in text
    for shown in ("Default: 5000.", "Default: 9108.", "Default: 127.0.0.1.", "in bytes", "Seconds"):
        assert shown in text


def test_help_shows_the_flags_that_most_people_look_for() -> None:
    text = plain(CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "120", "TERM": "dumb"}).output)
    for flag in (
        "--model",
        "--dtype",
        "--max-model-len",
        "--devices",
        "--max-batch-size",
        "--kv-cache-tokens",
        "--port",
    ):
        assert f"{flag} " in text
    assert "--lending-extent-blocks" not in text


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).output.strip() == f"vramancer {__version__}"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--api"], ["serve"]),
        (["--port", "1", "--api", "some/model"], ["serve", "--port", "1", "some/model"]),
        (["serve", "--api"], ["serve"]),
        (["--api", "--cluster-master"], ["serve", "--cluster-master"]),
        (["--cluster-worker"], ["cluster", "join"]),
        (["--devices", "cpu", "--cluster-worker"], ["cluster", "join", "--devices", "cpu"]),
        (["cluster", "join", "--cluster-worker"], ["cluster", "join"]),
        (["plan", "x"], ["plan", "x"]),
        ([], []),
    ],
)
def test_api_means_serve(given: list[str], expected: list[str]) -> None:
    assert as_command(given) == expected


@pytest.mark.parametrize(("given", "order"), [(None, "PCI_BUS_ID"), ("FASTEST_FIRST", "FASTEST_FIRST")])
def test_gpus_are_numbered_as_nvidia_smi_does_unless_the_user_says_how(
    monkeypatch: pytest.MonkeyPatch, given: str | None, order: str
) -> None:
    monkeypatch.setenv("CUDA_DEVICE_ORDER", given or "")  # put back afterwards
    if given is None:
        monkeypatch.delenv("CUDA_DEVICE_ORDER")
    seen: list[str] = []
    monkeypatch.setattr("vramancer.main.app", lambda **given: seen.append(os.environ["CUDA_DEVICE_ORDER"]))
    main(["status"])
    assert seen == [order], "set before a command runs"


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_errors_are_red_unless_colours_are_unwanted(
    monkeypatch: pytest.MonkeyPatch, no_color: str, coloured: bool
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", no_color)
    with pytest.raises(typer.Exit):
        fail("[link] " + "long " * 60)
    assert ("\x1b[31m" in terminal.getvalue()) is coloured
    assert plain(terminal.getvalue()) == "error: [link] " + "long " * 60 + "\n", "in one line, as it was said"
