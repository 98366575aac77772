"""How a start goes: progress and log lines side by side, ports that are taken."""

from __future__ import annotations

import io
import logging
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
from rich.console import Console
from rich.progress import Progress

from core.config import ApiSettings, LoggingSettings, load_settings
from core.errors import PortInUseError
from core.logs import configure_logging, get_logger
from core.metrics import MetricsRegistry
from vramancer import server
from vramancer.server import LoadingBar, loading_bar

GIB = 1 << 30


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def logs() -> Iterator[None]:
    """Logging is put back afterwards."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    structlog.contextvars.clear_contextvars()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def lines_on_screen(text: str) -> list[str]:
    """What a terminal shows in the end, with what was erased left out."""
    screen: list[str] = [""]
    row = 0
    for piece in re.findall(r"\x1b\[[0-9;?]*[a-zA-Z]|\r|\n|[^\x1b\r\n]+", text):
        if piece == "\n":
            row += 1
            if row == len(screen):
                screen.append("")
        elif piece.endswith("A") and piece.startswith("\x1b"):
            row -= int(piece[2:-1] or 1)
        elif piece == "\x1b[2K":
            screen[row] = ""
        elif piece[0] not in "\r\x1b":
            screen[row] += piece
    return [line for line in screen if line.strip()]


@pytest.mark.usefixtures("logs")
def test_log_lines_stand_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    configure_logging(LoggingSettings())
    with loading_bar() as bar:
        bar.report(GIB, 4 * GIB)
        get_logger("test").warning("memory was taken")
        bar.report(2 * GIB, 4 * GIB)
        get_logger("test").warning("half of it")
        bar.finish()
    get_logger("test").warning("afterwards")
    assert "loading weights" in terminal.getvalue()
    lines = lines_on_screen(terminal.getvalue())
    assert [re.search(r"memory was taken|half of it|afterwards", line) is not None for line in lines] == [True] * 3
    assert not any("loading weights" in line for line in lines), "no line shares its place with the bar"


@pytest.mark.usefixtures("logs")
def test_without_a_terminal_there_are_plain_lines_at_sensible_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = io.StringIO()
    monkeypatch.setattr(sys, "stderr", plain)
    configure_logging(LoggingSettings())
    now = SimpleNamespace(s=0.0)
    bar = LoadingBar(Progress(console=Console(stderr=True), disable=True), drawn=False, clock=lambda: now.s)
    for percent in range(101):
        now.s = percent / 4
        bar.report(percent * GIB, 100 * GIB)
    lines = plain.getvalue().splitlines()
    assert [re.search(r"percent=(\d+)", line)[1] for line in lines] == ["25", "50", "75", "100"]  # type: ignore[index]
    assert "\x1b" not in plain.getvalue() and "100 GiB" in lines[0]


@pytest.mark.usefixtures("logs")
def test_a_quick_load_logs_no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = io.StringIO()
    monkeypatch.setattr(sys, "stderr", plain)
    configure_logging(LoggingSettings())
    bar = LoadingBar(Progress(console=Console(stderr=True), disable=True), drawn=False, clock=lambda: 5.0)
    for quarter in range(5):
        bar.report(quarter, 4)
    assert plain.getvalue() == ""


@pytest.mark.usefixtures("logs")
def test_the_bar_comes_once_and_never_while_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    configure_logging(LoggingSettings())
    with loading_bar() as bar:
        for done in (1, 4, 5, 6):  # a head that two stages read counts twice
            bar.report(done * GIB, 4 * GIB)
        assert terminal.getvalue().count("\x1b[?25l") == 1, "started once"
        bar.finish()
        assert "6.0/4.0" not in terminal.getvalue()
        drawn = terminal.getvalue()
        bar.report(GIB, 4 * GIB)  # another model, while this one serves
        assert terminal.getvalue() == drawn


@pytest.mark.usefixtures("logs")
def test_a_later_load_is_logged_too(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = io.StringIO()
    monkeypatch.setattr(sys, "stderr", plain)
    configure_logging(LoggingSettings())
    now = SimpleNamespace(s=0.0)
    bar = LoadingBar(Progress(console=Console(stderr=True), disable=True), drawn=False, clock=lambda: now.s)
    for _ in range(2):
        for percent in range(101):
            now.s += 0.25
            bar.report(percent * GIB, 100 * GIB)
    assert re.findall(r"percent=(\d+)", plain.getvalue()) == ["25", "50", "75", "100"] * 2


def metrics_server(api: ApiSettings, listener: Any) -> server.MetricsServer:
    pipeline = SimpleNamespace(settings=SimpleNamespace(api=api), metrics=MetricsRegistry())
    return server._metrics_server(pipeline, listener)  # type: ignore[arg-type]


def test_a_metrics_port_that_nobody_chose_gives_way() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as listener:
        usual = taken.getsockname()[1]
        api = ApiSettings(port=0).model_copy(update={"metrics_port": usual})
        api.model_fields_set.discard("metrics_port")  # as if this were the default
        metrics = metrics_server(api, listener)
        metrics.start()
        try:
            assert usual < metrics.port <= usual + server.OTHER_METRICS_PORTS
            assert metrics.port != listener.getsockname()[1]
        finally:
            metrics.stop()


def test_the_apis_own_port_is_left_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        own = listener.getsockname()[1]
        api = ApiSettings(port=0).model_copy(update={"metrics_port": own - 1})
        api.model_fields_set.discard("metrics_port")
        assert own not in metrics_server(api, listener)._ports


def test_a_metrics_port_that_was_chosen_is_an_error_that_names_the_flag(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as listener:
        environ = {"HOME": str(tmp_path), "VRM_METRICS_PORT": str(taken.getsockname()[1])}
        api = load_settings(None, environ).api
        metrics = metrics_server(api, listener)
        try:
            with pytest.raises(PortInUseError, match="--metrics-port"):
                metrics.start()
        finally:
            metrics.stop()


def test_what_was_chosen_is_known_from_every_source(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path)}
    assert "metrics_port" not in load_settings(None, environ).api.model_fields_set
    config = tmp_path / "config.yaml"
    config.write_text("api: {metrics_port: 9108}\n")
    chosen = (
        load_settings(config, environ),
        load_settings(None, environ | {"VRM_METRICS_PORT": "9108"}),
        load_settings(None, environ, {"api.metrics_port": 9108}),
    )
    assert all("metrics_port" in settings.api.model_fields_set for settings in chosen)
