"""The command `run`: what it is asked, who answers, what it prints, how it exits."""

from __future__ import annotations

import io
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cli.chat.scripted import Scripted, interrupted
from cli.fake_server import serves
from typer.testing import CliRunner, Result

from core.config import LoggingSettings, Settings
from vramancer.cli import app
from vramancer.cli.chat import command, source

pytestmark = pytest.mark.usefixtures("environment")


def run(*arguments: str, piped: str | bytes = "") -> Result:
    return CliRunner().invoke(app, ["run", *arguments], input=piped)


def asked(server: Any) -> dict[str, Any]:
    """The last request's body."""
    body: dict[str, Any] = json.loads(server.seen[-1][3])
    return body


@pytest.fixture
def configured(server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server of ours with the model `tiny`, where the settings say."""
    serves(server, "tiny", "Hel", "lo **you**")
    monkeypatch.setenv("VRM_API_PORT", str(server.server_port))
    return server


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Models that would be loaded here; they answer nothing but `here`."""
    names: list[str | None] = []

    @contextmanager
    def loaded(settings: Settings, note: Any) -> Iterator[Scripted]:
        names.append(settings.model.name)
        yield Scripted(lambda messages: [command_piece("here")])

    monkeypatch.setattr(source, "_loaded_here", loaded)
    return names


def command_piece(text: str) -> Any:
    from vramancer.cli.chat.answerer import Piece

    return Piece(text, 1)


# -- the question ------------------------------------------------------------------------------------------------------


def test_one_question_is_answered_and_nothing_else_is_printed(configured: Any) -> None:
    result = run("What is it?")
    assert (result.exit_code, result.stdout) == (0, "Hello **you**\n")
    assert "2 tokens" in result.stderr
    assert asked(configured)["messages"] == [{"role": "user", "content": "What is it?"}]


def test_files_and_what_is_piped_go_before_the_question(configured: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("file a")
    (tmp_path / "b.txt").write_text("file b")
    run("why?", "--file", "a.txt", "--file", "b.txt", "--system", "Be brief.", piped="a log\n")
    assert asked(configured)["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "file a\n\nfile b\n\na log\n\nwhy?"},
    ]
    run(piped="Only this\n")
    assert asked(configured)["messages"] == [{"role": "user", "content": "Only this"}]


@pytest.mark.parametrize(
    ("arguments", "piped", "said"),
    [
        ((), "", "there is no question"),
        (("a", "b", "c"), "", "in quotes"),
        (("?", "--file", "nowhere"), "", "--file nowhere: cannot be read"),
        (("?",), b"\xff\xfe", "standard input: not text in UTF-8"),
        (("?", "--url", "http://x", "--local"), "", "give one of them"),
        (("a/b", "?", "--model", "c/d"), "", "given twice"),
    ],
)
def test_wrong_usage_is_status_2(configured: Any, arguments: tuple[str, ...], piped: str | bytes, said: str) -> None:
    result = run(*arguments, piped=piped)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert "/v1/chat/completions" not in {seen[1] for seen in configured.seen}


def test_what_fails_is_status_1(configured: Any) -> None:
    configured.answers["/v1/chat/completions"] = (429, b'{"error": {"message": "The queue is full."}}')
    result = run("?")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "The queue is full." in result.stderr


def test_ctrl_c_is_status_130_and_what_came_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def opened(*arguments: Any, **options: Any) -> Iterator[Scripted]:
        yield Scripted(interrupted)

    monkeypatch.setattr(command, "open_answerer", opened)
    result = run("?")
    assert (result.exit_code, result.stdout) == (130, "I was say\n")


def test_ctrl_c_while_loading_is_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def opened(*arguments: Any, **options: Any) -> Iterator[Scripted]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(command, "open_answerer", opened)
    assert run("?").exit_code == 130


@pytest.mark.parametrize(
    ("flags", "sent"),
    [
        ((), {}),
        (("--temperature", "0"), {"temperature": 0.0}),
        (("--temperature", "1.5", "--max-tokens", "7"), {"temperature": 1.5, "max_tokens": 7}),
        (("--seed", "3"), {"seed": 3}),
        (("--model", "another"), {"model": "another"}),
    ],
)
def test_each_flag_reaches_the_server(server: Any, flags: tuple[str, ...], sent: dict[str, Any]) -> None:
    serves(server, "tiny", "x")
    assert run("--url", server.url, "Hi", *flags).exit_code == 0
    body = {name: value for name, value in asked(server).items() if name not in ("stream", "stream_options")}
    assert body == {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], **sent}


@pytest.mark.parametrize(("level", "used"), [("info", "warning"), ("debug", "debug"), ("error", "error")])
def test_no_log_lines_stand_between_answers(level: str, used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[LoggingSettings] = []
    monkeypatch.setattr("core.logs.configure_logging", seen.append)
    run("a", "b", "--log-level", level, "--url", "http://127.0.0.1:1")
    assert [settings.level for settings in seen] == [used]


# -- who answers -------------------------------------------------------------------------------------------------------


def test_a_server_that_runs_here_is_used_and_that_is_said(configured: Any, loads: list[str | None]) -> None:
    result = run("?")
    assert f"tiny on the server at {configured.url}; --local loads a model here instead" in result.stderr
    run("org/tiny", "?")
    assert loads == ["org/tiny"]  # it does not serve that
    assert {seen[2] for seen in configured.seen if seen[1] != "/live"} == {"Bearer secret"}


def test_by_another_of_its_names_too(configured: Any, loads: list[str | None]) -> None:
    configured.answers["/v1/models/org/tiny"] = (200, b'{"id": "org/tiny", "root": "tiny"}')
    run("org/tiny", "?")
    assert (loads, asked(configured)["model"]) == ([], "tiny")


def test_local_loads_here_all_the_same(configured: Any, loads: list[str | None]) -> None:
    assert run("?", "--local").stdout == "here\n"
    assert loads == [None]
    assert configured.seen == []


@pytest.mark.parametrize(
    ("path", "status", "answer", "said"),
    [
        ("/live", 200, b'{"status": "other"}', None),
        ("/live", 200, b"<html>", None),
        ("/live", 404, b"", None),
        ("/v1/models", 200, b'{"data": []}', None),
        ("/v1/models", 401, b'{"error": {"message": "The API token is wrong."}}', "The API token is wrong."),
    ],
)
def test_otherwise_the_model_is_loaded_here(
    configured: Any, loads: list[str | None], path: str, status: int, answer: bytes, said: str | None
) -> None:
    configured.answers[path] = (status, answer)
    result = run("?")
    assert (result.exit_code, result.stdout, loads) == (0, "here\n", [None])
    assert said is None or said in result.stderr


def test_another_model_than_it_serves_is_loaded_here(configured: Any, loads: list[str | None]) -> None:
    result = run("org/other", "?")
    assert loads == ["org/other"]
    assert f"the server at {configured.url} serves tiny, not org/other" in result.stderr


def test_the_token_goes_to_none_but_our_server(configured: Any, loads: list[str | None]) -> None:
    """Something else that listens on the port is asked one public thing, without the token."""
    configured.answers["/live"] = (200, b'{"status": "up"}')
    run("?")
    assert [(seen[1], seen[2]) for seen in configured.seen] == [("/live", None)]


def test_a_port_that_says_nothing_is_no_server(monkeypatch: pytest.MonkeyPatch, loads: list[str | None]) -> None:
    monkeypatch.setattr(source, "_PROBE_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("VRM_API_PORT", str(silent.getsockname()[1]))
        assert run("?").stdout == "here\n"


# -- a conversation without a terminal for the answers -----------------------------------------------------------------


class TypedIn(io.StringIO):
    """A keyboard."""

    def isatty(self) -> bool:
        return True


def test_questions_typed_in_and_answers_in_a_pipe(
    configured: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", TypedIn("Hi\n/set seed 1\nAgain\n/bye\n"))
    with pytest.raises(SystemExit) as left:
        app(["run"])
    assert left.value.code == 0
    out, err = capsys.readouterr()
    assert out == "Hello **you**\nHello **you**\n"
    assert "> " in err
    assert asked(configured)["seed"] == 1
    assert len(asked(configured)["messages"]) == 3
