"""The command `vramancer run`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from core.config import LoggingSettings, Settings
from core.errors import ConfigError
from vramancer.cli.chat.commands import completions
from vramancer.cli.chat.conversation import Conversation
from vramancer.cli.chat.editor import HISTORY_NAME, Editor, LineReader, Reader
from vramancer.cli.chat.inputs import Texts, compose, is_keyboard, split_words
from vramancer.cli.chat.screen import Screen
from vramancer.cli.chat.source import open_answerer
from vramancer.cli.chat.talk import talk
from vramancer.cli.options import settings_command

INTERRUPTED = 130
"""Exit status of what Ctrl-C ended."""


def _model_of(arguments: dict[str, Any]) -> str | None:
    return split_words(arguments["words"] or ())[0]


@settings_command("model", "devices", "engine", "lending", "memory", "logging", "runtime", model_from=_model_of)
def run(
    settings: Settings,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [QUESTION]",
            help="One word alone is the model if there is such a path or it reads owner/name, else the question.",
            show_default=False,
        ),
    ] = None,
    files: Annotated[
        list[Path] | None,
        typer.Option("--file", metavar="PATH", help="Text file to put before the question; may be repeated."),
    ] = None,
    url: Annotated[str | None, typer.Option("--url", help="Ask the server at this URL.")] = None,
    local: Annotated[
        bool, typer.Option("--local", help="Load the model here, also if a server on this machine serves it.")
    ] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Show answers as they are, without drawing Markdown.")] = False,
    system: Annotated[str | None, typer.Option("--system", help="System message to begin with.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Longest answer, in tokens. Not set: the context's end.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0.0, max=2.0, help="Randomness. Not set: the model's own.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="The same seed gives the same answer.")] = None,
) -> int:
    """Ask a model in the terminal: one question, or a conversation.

    A server on this machine answers if it serves the model; else it is loaded here.
    Text that is piped in goes before the question; into a pipe goes the answer alone.
    """
    from core.logs import configure_logging

    configure_logging(_between_answers(settings.logging))
    texts = Texts()
    before = compose(*texts.of_files(files or ()))
    question = compose(texts.of_stdin(), split_words(words or ())[1])
    typed_in = not question and is_keyboard(sys.stdin)
    if not (before or question or typed_in):
        raise ConfigError("there is no question: give one, or pipe it in.")
    asked = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    sampling = {name: value for name, value in asked.items() if value is not None}
    screen = Screen(Console(highlight=False), Console(stderr=True, highlight=False), plain=plain)
    try:
        with open_answerer(settings, url, local=local, note=screen.note) as answerer:
            conversation = Conversation(answerer, screen, sampling, system, before)
            if typed_in:
                return _converse(conversation, settings.runtime.state_dir)
            return INTERRUPTED if conversation.ask(question).stopped else 0
    except KeyboardInterrupt:
        return INTERRUPTED


def _between_answers(settings: LoggingSettings) -> LoggingSettings:
    """Log lines would stand between questions and answers: unless more is asked for, warnings and errors alone."""
    return settings.model_copy(update={"level": "warning"}) if settings.level == "info" else settings


def _converse(conversation: Conversation, state_dir: Path) -> int:
    screen = conversation.screen
    screen.note(f"{conversation.answerer.model_name}: /help lists commands, Ctrl-D leaves")
    reader: Reader = LineReader(screen.ask_for)
    if sys.stdout.isatty():
        reader = Editor(state_dir / HISTORY_NAME, completions(), screen.note)
    talk(conversation, reader)
    return 0
