"""The conversation in the terminal, with answers made up by the test."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from rich.console import Console

from core.errors import QueueFullError
from core.request import SamplingParams
from vramancer.cli.chat import LocalAnswerer, Message, Sampling, chat

Answer = Callable[[list[Message]], Iterator[str]]


class Scripted:
    """Answers each turn with the next of `answers`; keeps the messages it was given and what was closed."""

    model_name = "tiny"

    def __init__(self, *answers: Answer) -> None:
        self._answers = list(answers)
        self.seen: list[list[Message]] = []
        self.closed = 0

    def answer(self, messages: list[Message], sampling: Sampling) -> Iterator[str]:
        self.seen.append([dict(message) for message in messages])
        try:
            yield from self._answers.pop(0)(messages)
        finally:
            self.closed += 1


def says(*pieces: str) -> Answer:
    return lambda messages: iter(pieces)


def interrupted(messages: list[Message]) -> Iterator[str]:
    yield "I was say"
    raise KeyboardInterrupt


def refused(messages: list[Message]) -> Iterator[str]:
    raise QueueFullError("The queue is full.")
    yield ""


def hold(monkeypatch: pytest.MonkeyPatch, answerer: Scripted, lines: list[str], system: str | None = None) -> str:
    """What the terminal shows of a conversation with these lines typed; they end with the end of input."""
    typed = iter(lines)

    def read(*args: object, **kwargs: object) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    console = Console(file=io.StringIO(), width=200)
    monkeypatch.setattr(console, "input", read)
    chat(answerer, {}, system, console)
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


def roles(messages: list[Message]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


def test_answers_are_shown_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    answerer = Scripted(says("Hel", "lo [bold]"), says("Bye"))
    shown = hold(monkeypatch, answerer, ["Hi", "", "And?", "/exit", "not read"])
    assert "Hello [bold]" in shown  # the model's text is no markup
    assert roles(answerer.seen[1]) == [("user", "Hi"), ("assistant", "Hello [bold]"), ("user", "And?")]
    assert len(answerer.seen) == 2


def test_clear_forgets_all_but_the_system_message(monkeypatch: pytest.MonkeyPatch) -> None:
    answerer = Scripted(says("one"), says("two"))
    hold(monkeypatch, answerer, ["Hi", "/clear", "Again"], system="Be brief.")
    assert roles(answerer.seen[1]) == [("system", "Be brief."), ("user", "Again")]


def test_ctrl_c_stops_the_answer_and_not_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    answerer = Scripted(interrupted, says("ok"))
    shown = hold(monkeypatch, answerer, ["Hi", "Go on"])
    assert "I was say (stopped)" in shown
    assert "ok" in shown
    assert roles(answerer.seen[1])[1] == ("assistant", "I was say")
    assert answerer.closed == 2


def test_an_error_is_shown_and_its_turn_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    answerer = Scripted(refused, says("ok"))
    shown = hold(monkeypatch, answerer, ["Hi", "Once more"])
    assert "error: The queue is full." in shown
    assert roles(answerer.seen[1]) == [("user", "Once more")]


def test_an_unknown_command_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    answerer = Scripted()
    assert "/clear forgets" in hold(monkeypatch, answerer, ["/help"])
    assert answerer.seen == []


class Submitted(Exception):
    """What a pipeline was asked for."""


class Asked:
    """A pipeline's surface, as far as a conversation needs it."""

    def __init__(self, **defaults: object) -> None:
        tokenizer = SimpleNamespace(encode_chat=lambda messages, add_generation_prompt: [len(messages)])
        self.model = SimpleNamespace(name="tiny", generation_defaults=defaults, tokenizer=tokenizer)

    def submit(self, prompt: list[int], params: SamplingParams) -> None:
        raise Submitted(prompt, params)


@pytest.mark.parametrize(
    ("defaults", "sampling", "params"),
    [
        ({}, {}, SamplingParams()),
        ({"temperature": 0.6, "not_ours": 1}, {}, SamplingParams(temperature=0.6)),
        ({"temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0}, SamplingParams(temperature=0.0, top_p=0.9)),
        ({}, {"max_tokens": 5}, SamplingParams(max_tokens=5)),
    ],
)
def test_what_is_asked_for_here_goes_before_the_models_own(
    defaults: dict[str, object], sampling: Sampling, params: SamplingParams
) -> None:
    answerer = LocalAnswerer(Asked(**defaults))  # type: ignore[arg-type]
    with pytest.raises(Submitted) as asked:
        next(answerer.answer([{"role": "user", "content": "Hi"}], sampling))
    assert asked.value.args == ([1], params)
