"""`vramancer dashboard`: a running server, live in the terminal."""

from vramancer.cli.live.command import dashboard

__all__ = ["dashboard"]
