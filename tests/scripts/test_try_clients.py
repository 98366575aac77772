"""`scripts/try_clients.py`: how checks are judged, what becomes of clients that do not end well, and the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import try_clients
from clients import scripted
from clients.common import LENGTH, OK, SERVER, WIT, Cut, Wit, check, hoped, in_cities, outcome_of, whole
from clients.environments import Client, Environment, all_clients
from clients.results import BROKEN, Line, Tried, read_lines, table
from transformers import AutoTokenizer


class LengthFinishReasonError(Exception):
    """As OpenAI's client calls it."""


@pytest.mark.parametrize(
    ("error", "free", "constrained"),
    [
        (Wit("it said Rome"), WIT, SERVER),
        (Cut("length"), LENGTH, LENGTH),
        (LengthFinishReasonError(), LENGTH, LENGTH),
        (ValueError("no JSON"), SERVER, SERVER),
        (AssertionError("two calls"), SERVER, SERVER),
    ],
    ids=repr,
)
def test_a_model_is_to_blame_only_where_it_has_a_choice(error: Exception, free: str, constrained: str) -> None:
    assert (outcome_of(error, constrained=False), outcome_of(error, constrained=True)) == (free, constrained)


def test_what_an_error_came_from_counts() -> None:
    error = ValueError("no object")
    error.__cause__ = LengthFinishReasonError()
    assert outcome_of(error, constrained=True) == LENGTH


def test_helpers_tell_faults_from_wit() -> None:
    assert hoped("It is Paris.") == "It is Paris."
    with pytest.raises(Wit):
        hoped("It is Rome.")
    whole("stop", "stop")
    with pytest.raises(Cut):
        whole("length", "stop")
    with pytest.raises(AssertionError):
        whole("tool_calls", "stop")
    assert in_cities('{"city": "Oslo"}') == {"city": "Oslo"}
    for wrong in ('{"city": "Bonn"}', '{"city": "Oslo", "day": 1}', "{}"):
        with pytest.raises(AssertionError):
            in_cities(wrong)


def run_checks(status: int | None, capsys: pytest.CaptureFixture[str]) -> list[Line]:
    @check("good")
    def _() -> Any:
        return "Paris"

    @check("witless", constrained=True)
    def _() -> Any:
        return hoped("Rome")

    print("the client says something")
    return read_lines(capsys.readouterr().out, status=status, said="Traceback\nZeroDivisionError")


def test_a_line_that_a_client_leaves_open_hides_no_check(capsys: pytest.CaptureFixture[str]) -> None:
    print("\x1b[?25h", end="")
    assert len(run_checks(0, capsys)) == 2


def test_lines_are_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    good, witless = run_checks(0, capsys)
    assert good == Line("good", OK, "Paris", "demo")
    assert (witless.outcome, witless.detail) == (SERVER, "Wit: 'Rome' has no 'Paris'")


@pytest.mark.parametrize(("status", "said"), [(None, "no answer in time"), (3, "status 3: Traceback ZeroDivision")])
def test_a_client_that_does_not_end_well_is_broken(
    status: int | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    last = run_checks(status, capsys)[-1]
    assert last.outcome == BROKEN
    assert said in last.detail


def test_one_that_checks_nothing_is_broken() -> None:
    (line,) = read_lines("", status=0)
    assert line.outcome == BROKEN


def test_what_a_client_in_another_language_prints_is_judged_alike() -> None:
    """The rules are written twice, here and in `common.mjs`."""
    shown = {"check": "c", "on": "demo", "constrained": True, "outcome": WIT, "detail": "d"}
    assert read_lines(json.dumps(shown), status=0)[0].outcome == SERVER
    assert read_lines(json.dumps(shown | {"constrained": False}), status=0)[0].outcome == WIT
    assert read_lines(json.dumps(shown | {"outcome": "fine"}), status=0)[0].outcome == BROKEN


def test_the_table_counts_and_stays_a_table() -> None:
    lines = [Line("a", OK, "x | y\nz", "demo"), Line("b", SERVER, "<tool>" + "long " * 99, "demo", constrained=True)]
    tried = Tried("llm", "llm 0.36", "2026-01-02", lines)
    assert not tried.good
    assert Tried("llm", "", "", lines[:1]).good
    assert not Tried("llm", "", "").good, "nothing was tried"
    assert Tried.from_json(tried.to_json()) == tried
    rows = table([tried]).splitlines()
    assert rows[2] == "| llm | llm 0.36 | 2026-01-02 | 1 |  |  | 1 |  |"
    assert rows[-2] == r"| llm | a | demo | ok | x \| y z |"
    assert rows[-1].startswith(r"| llm | b | demo, constrained | **server** | \<tool>long")
    assert len(rows[-1]) < 200
    assert "clients.md" in try_clients.report([tried], "clients.md")


def test_every_client_is_pinned_and_has_checks() -> None:
    clients = all_clients()
    assert len(clients) >= 15
    for client in clients:
        assert not any(mark in client.needs.read_text() for mark in ("^", "~", ">", "latest")), client.name
        for package in client.versions.split(", ") if client.needs.read_text() else ():
            assert package.split()[-1][0].isdigit(), client.versions
        assert "common" in client.check.read_text()


def test_a_client_sees_nothing_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("VRM_API_TOKEN", "OPENAI_API_KEY", "PYTHONPATH"):
        monkeypatch.setenv(name, "x")
    environment = Environment(Client("codex"), tmp_path)
    variables = environment.variables(tmp_path)
    assert not variables.keys() & {"VRM_API_TOKEN", "OPENAI_API_KEY", "PYTHONPATH"}
    assert variables["PATH"].startswith(str(tmp_path / "codex" / "node_modules"))
    assert environment.command[-1].endswith("codex/check.py")


def test_the_script_has_an_answer_to_each_conversation(tmp_path: Path) -> None:
    """The prompt's last token chooses what is said."""
    scripted.build(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)

    def chosen(messages: list[dict[str, str]], *names: str) -> str:
        tools = [{"type": "function", "function": {"name": name}} for name in names] or None
        text: str = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        return text[text.rindex("[") :]

    user = [{"role": "user", "content": "a"}]
    assert chosen(user) == chosen(user, "other") == "[GREET]"
    assert chosen(user, "other", "weather") == "[WEATHER]"
    assert chosen(user, "read", "bash") == "[bash]"
    assert chosen([*user, {"role": "tool", "content": "rain"}], "weather") == "[TOLD]"
    assert chosen(user, "weather", "final_answer") == "[STEP]"
    assert chosen([{"role": "user", "content": "Observation: rain"}], "weather", "final_answer") == "[FINAL]"
