"""Answers made up by the test, and the terminal that shows them."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Generator, Iterable

from rich.console import Console

from scripts.captures import Terminal
from vramancer.cli.chat.answerer import Message, Piece, Sampling
from vramancer.cli.chat.conversation import Conversation
from vramancer.cli.chat.screen import Screen
from vramancer.cli.chat.talk import talk

Answer = Callable[[list[Message]], Iterable[Piece]]


class Scripted:
    """Answers each turn with the next of `answers`; keeps the messages it was given and what was closed."""

    def __init__(self, *answers: Answer, shared_at: str | None = None) -> None:
        self._answers = list(answers)
        self.shared_at = shared_at
        self.model_name = "tiny"
        self.known = {"tiny"}
        self.loaded: list[str] = []
        self.seen: list[list[Message]] = []
        self.sampling: list[Sampling] = []
        self.closed = 0

    def answer(self, messages: list[Message], sampling: Sampling) -> Generator[Piece, None, None]:
        self.seen.append([dict(message) for message in messages])
        self.sampling.append(dict(sampling))
        try:
            yield from self._answers.pop(0)(messages)
        finally:
            self.closed += 1

    def serves(self, model: str) -> bool:
        return model in self.known

    def switch(self, model: str) -> None:
        if model not in self.known:
            self.loaded.append(model)
        self.model_name = model


def says(*texts: str, finish_reason: str = "stop") -> Answer:
    """One token for each text."""
    pieces = [Piece(text, tokens) for tokens, text in enumerate(texts, start=1)]
    return lambda messages: [*pieces, Piece("", len(texts), finish_reason)]


def interrupted(messages: list[Message]) -> Iterable[Piece]:
    """Ctrl-C comes in the middle."""
    yield Piece("I was say", 3)
    raise KeyboardInterrupt


class Lines:
    """A reader of these lines; an exception among them is raised. They end with the end of input."""

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self._lines = iter(lines)
        self.prompts: list[str] = []

    def read(self, prompt: str = "> ") -> str:
        self.prompts.append(prompt)
        line = next(self._lines, EOFError)
        if isinstance(line, str):
            return line
        raise line


def quiet_screen() -> tuple[Screen, io.StringIO, io.StringIO]:
    """A screen where nothing is a terminal, what it answers, and its notes. A clock that ticks once a second."""
    answers, notes = io.StringIO(), io.StringIO()
    seconds = itertools.count()
    return Screen(Console(file=answers), Console(file=notes), clock=lambda: next(seconds)), answers, notes


def hold(
    answerer: Scripted, *lines: str | type[BaseException], system: str | None = None, before: str = ""
) -> tuple[str, str, Conversation]:
    """The answers and the notes of a conversation with these lines typed, and the conversation."""
    screen, answers, notes = quiet_screen()
    conversation = Conversation(answerer, screen, {}, system, before)
    talk(conversation, Lines(*lines))
    return answers.getvalue(), notes.getvalue(), conversation


def on_terminal(answerer: Scripted, question: str, *, width: int = 60, height: int = 100) -> Terminal:
    """The terminal after an answer to a question."""
    terminal = Terminal(width, height)
    Conversation(answerer, Screen(terminal.console(), terminal.console()), {}).ask(question)
    return terminal


def roles(messages: list[Message]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]
