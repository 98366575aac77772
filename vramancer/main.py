"""Entry point: `python -m vramancer.main --api [flags]` is `vramancer serve [flags]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from core.config import number_gpus_by_slot
from vramancer.cli import app


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program with `argv` (the process's own arguments); exits with the command's status."""
    number_gpus_by_slot()
    app(args=as_command(list(sys.argv[1:] if argv is None else argv)), prog_name="vramancer")


def as_command(arguments: list[str]) -> list[str]:
    """`--api` says "serve": it may stand anywhere among the flags."""
    if "--api" not in arguments:
        return arguments
    rest = [argument for argument in arguments if argument != "--api"]
    return rest if rest[:1] == ["serve"] else ["serve", *rest]


if __name__ == "__main__":
    main()
