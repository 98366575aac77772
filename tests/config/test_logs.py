"""Log lines: one format for our loggers and everybody else's, with the request id."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator

import pytest
import structlog

from core.config import LoggingSettings
from core.logs import configure_logging, get_logger

Start = Callable[..., io.StringIO]


@pytest.fixture
def start() -> Iterator[Start]:
    """Configures logging into a buffer; the root logger is put back afterwards."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    structlog.contextvars.clear_contextvars()  # a request served in this thread leaves its id bound

    def configure(stream: io.StringIO | None = None, **settings: object) -> io.StringIO:
        stream = stream or io.StringIO()
        configure_logging(LoggingSettings.model_validate(settings), stream)
        return stream

    yield configure
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def test_json_lines_carry_values_and_the_request_id(start: Start) -> None:
    stream = start(json_output=True)
    with structlog.contextvars.bound_contextvars(request_id="req-7"):
        get_logger("core.test").info("model loaded", layers=3)
        logging.getLogger("somebody.else").warning("hello %s", "there")
    get_logger("core.test").info("afterwards")
    ours, theirs, after = (json.loads(line) for line in stream.getvalue().splitlines())
    assert (ours["event"], ours["layers"], ours["level"], ours["logger"]) == ("model loaded", 3, "info", "core.test")
    assert (theirs["event"], theirs["level"], theirs["logger"]) == ("hello there", "warning", "somebody.else")
    assert ours["request_id"] == theirs["request_id"] == "req-7"
    assert "request_id" not in after
    assert ours["timestamp"].endswith("Z")


def test_json_lines_hold_the_traceback(start: Start) -> None:
    stream = start(json_output=True)
    try:
        raise KeyError("lost")
    except KeyError:
        get_logger("core.test").exception("step failed")
    assert "KeyError: 'lost'" in json.loads(stream.getvalue())["exception"]


def test_text_has_colours_on_a_terminal_only(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    plain = start()
    get_logger("core.test").info("ready", port=5000)
    coloured = start(stream=Terminal())
    get_logger("core.test").info("ready", port=5000)
    assert "ready" in plain.getvalue() and "port=5000" in plain.getvalue()
    assert "\x1b[" not in plain.getvalue()
    assert "\x1b[" in coloured.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    unwanted = start(stream=Terminal())
    get_logger("core.test").info("ready", port=5000)
    assert "ready" in unwanted.getvalue() and "\x1b[" not in unwanted.getvalue()


def test_level_holds_for_all_loggers(start: Start) -> None:
    stream = start(level="warning")
    get_logger("core.test").info("quiet")
    logging.getLogger("somebody.else").info("quiet")
    get_logger("core.test").warning("loud")
    assert "quiet" not in stream.getvalue()
    assert "loud" in stream.getvalue()


def test_configuring_again_replaces_the_handler(start: Start) -> None:
    first, second = start(), start()
    get_logger("core.test").info("once")
    assert first.getvalue() == ""
    assert second.getvalue().count("once") == 1


def test_structlog_itself_goes_the_same_way(start: Start) -> None:
    stream = start(json_output=True, level="info")
    structlog.get_logger("third.party").info("hello")
    structlog.get_logger("third.party").debug("quiet")
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["logger"] == "third.party"
