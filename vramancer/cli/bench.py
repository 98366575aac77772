"""`vramancer bench`: the benchmarks of the source tree."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import typer

from vramancer.cli.options import fail

CHECKOUT = Path(__file__).resolve().parents[2]


def bench(context: typer.Context) -> None:
    """Measure this machine against other engines. Takes the flags of `python -m benchmarks.run`; paths are relative to
    the checkout.
    """
    if not (CHECKOUT / "benchmarks" / "run.py").is_file():
        fail("the benchmarks come with the source tree; run this from a checkout (pip install -e '.[bench]').")
    command = [sys.executable, "-m", "benchmarks.run", *context.args]
    raise typer.Exit(subprocess.run(command, cwd=CHECKOUT, check=False).returncode)
