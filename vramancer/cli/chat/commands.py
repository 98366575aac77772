"""What begins with a slash."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from core.errors import InvalidRequestError
from vramancer.cli.chat.conversation import Conversation
from vramancer.cli.chat.sampling import CHOICES, DEFAULT, read_choice, unknown

_COMMAND = re.compile(r"(/\w*)(?:\s+(.*))?", re.DOTALL)

Confirm = Callable[[str], bool]
"""Asks the user whether to go on."""


@dataclass(frozen=True, slots=True)
class Command:
    """One command: what it takes, what it does, and what of that may be said in one line of help."""

    run: Callable[[Conversation, str, Confirm], None]
    usage: str
    meaning: str


class LeaveError(Exception):
    """The user wants to go."""


def as_command(text: str) -> tuple[str, str] | None:
    """The command and what follows it; None for a question. A path such as /etc/hosts is none."""
    match = _COMMAND.fullmatch(text)
    return None if match is None else (match[1], (match[2] or "").strip())


def run_command(name: str, argument: str, conversation: Conversation, confirm: Confirm) -> None:
    """Raises `LeaveError` to end the conversation, and `VRAMancerError` for what is unknown or refused."""
    command = COMMANDS.get(name)
    if command is None:
        raise InvalidRequestError(unknown("command", name, COMMANDS))
    command.run(conversation, argument, confirm)


def completions() -> dict[str, Iterable[str]]:
    """What Tab offers: commands, and what may follow them."""
    return {name: (*CHOICES, "system") if name == "/set" else () for name in COMMANDS}


def _leave(conversation: Conversation, argument: str, confirm: Confirm) -> None:
    raise LeaveError


def _help(conversation: Conversation, argument: str, confirm: Confirm) -> None:
    rows = [(f"{name} {command.usage}", command.meaning) for name, command in COMMANDS.items() if command.meaning]
    rows += [
        ('"""', "begins and ends a question of several lines; Alt-Enter begins a new line too"),
        ("Ctrl-C", "stops an answer; at the prompt, twice leaves"),
        ("Ctrl-D", "leaves"),
    ]
    conversation.screen.show_table(rows)


def _set(conversation: Conversation, argument: str, confirm: Confirm) -> None:
    name, _, text = argument.partition(" ")
    text = text.strip()
    if not name:
        rows = [(key, _value(conversation, key), choice.meaning) for key, choice in CHOICES.items()]
        conversation.screen.show_table(rows)
        conversation.screen.show(f"system message: {_system(conversation)}")
    elif name == "system":
        _set_system(conversation, text, confirm)
    elif name not in CHOICES:
        raise InvalidRequestError(unknown("setting", name, [*CHOICES, "system"]))
    elif not text:
        conversation.screen.show(f"{name}: {_value(conversation, name)} ({CHOICES[name].meaning})")
    elif text == DEFAULT:
        conversation.sampling.pop(name, None)
        conversation.screen.note(f"{name} is the model's own again")
    else:
        conversation.sampling[name] = read_choice(name, text)
        conversation.screen.note(f"{name} is {conversation.sampling[name]}")


def _value(conversation: Conversation, name: str) -> str:
    value = conversation.sampling.get(name)
    return "model's own" if value is None else str(value)


def _system(conversation: Conversation) -> str:
    return "none" if conversation.system is None else conversation.system


def _set_system(conversation: Conversation, text: str, confirm: Confirm) -> None:
    if not text:
        conversation.screen.show(f"system message: {_system(conversation)}")
    elif text == DEFAULT:
        conversation.system = None
        conversation.screen.note("no system message from now on")
    else:
        conversation.system = text
        conversation.screen.note("this is the system message from now on")


def _model(conversation: Conversation, argument: str, confirm: Confirm) -> None:
    answerer = conversation.answerer
    url = answerer.shared_at
    where = "" if url is None else f" on {url}"
    if not argument:
        conversation.screen.show(answerer.model_name + where)
        return
    if not answerer.serves(argument):
        question = f"{url} loads {argument} in place of {answerer.model_name}, for all who use it. Go on?"
        if url is not None and not confirm(question):
            return
        conversation.screen.note(f"loading {argument}{where}")
    answerer.switch(argument)
    conversation.screen.note(f"{answerer.model_name}{where} answers from now on")


def _save(conversation: Conversation, argument: str, confirm: Confirm) -> None:
    if not argument:
        raise InvalidRequestError("/save takes the name of a file.")
    conversation.save(Path(argument))
    conversation.screen.note(f"saved to {argument}, as POST /v1/chat/completions takes it")


def _clear(conversation: Conversation, argument: str, confirm: Confirm) -> None:
    conversation.clear()
    conversation.screen.note("what was said is forgotten")


COMMANDS = {
    "/help": Command(_help, "", "shows this"),
    "/set": Command(_set, "[NAME [VALUE]]", f"shows or changes how answers are made; {DEFAULT} as VALUE takes it back"),
    "/system": Command(_set_system, "[TEXT]", f"shows or changes the system message; {DEFAULT} takes it back"),
    "/model": Command(_model, "[NAME]", "shows the model, or answers by another one from now on"),
    "/save": Command(_save, "FILE", "writes the conversation as JSON, in OpenAI's form"),
    "/clear": Command(_clear, "", "forgets what was said"),
    "/bye": Command(_leave, "", "leaves, as /exit does"),
    "/exit": Command(_leave, "", ""),
}
"""By name. Those without a meaning are other names."""
