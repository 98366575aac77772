"""Entry point: `python -m vramancer.main --api [flags]` is `vramancer serve [flags]`, and with `--cluster-worker` it is
`vramancer cluster join [flags]`."""

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
    """`--api` says "serve", and `--cluster-worker` "cluster join": they may stand anywhere among the flags."""
    for word, command in (("--api", ["serve"]), ("--cluster-worker", ["cluster", "join"])):
        if word in arguments:
            rest = [argument for argument in arguments if argument != word]
            return rest if rest[: len(command)] == command else [*command, *rest]
    return arguments


if __name__ == "__main__":
    main()
