"""Questions typed one after the other."""

from __future__ import annotations

from core.errors import VRAMancerError
from vramancer.cli.chat.commands import LeaveError, as_command, run_command
from vramancer.cli.chat.conversation import Conversation
from vramancer.cli.chat.editor import Reader, unquoted


def talk(conversation: Conversation, reader: Reader) -> None:
    """Read and answer until /bye, the end of input, or Ctrl-C twice at the prompt. What fails is shown, and it goes
    on."""
    asked_to_leave = False
    while True:
        try:
            typed = reader.read().strip()
        except KeyboardInterrupt:
            if asked_to_leave:
                return
            asked_to_leave = True
            conversation.screen.note("Ctrl-C again, or Ctrl-D, leaves")
            continue
        except EOFError:
            return
        asked_to_leave = False
        try:
            _take(typed, conversation, reader)
        except LeaveError:
            return
        except KeyboardInterrupt:
            conversation.screen.note("stopped")
        except VRAMancerError as error:
            conversation.screen.error(error.message)


def _take(typed: str, conversation: Conversation, reader: Reader) -> None:
    command, question = as_command(typed), unquoted(typed)
    if command is not None:
        run_command(*command, conversation, lambda asked: _confirmed(asked, reader))
    elif question:
        conversation.ask(question)


def _confirmed(question: str, reader: Reader) -> bool:
    try:
        return reader.read(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        return False
