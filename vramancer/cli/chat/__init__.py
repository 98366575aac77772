"""`vramancer run`: questions and answers in the terminal, by a model loaded here or on a running server."""

from vramancer.cli.chat.command import run

__all__ = ["run"]
