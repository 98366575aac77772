"""The check of an installation runs, and notices a server that does not start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def smoke(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.smoke", *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_an_installation_that_serves_passes() -> None:
    ended = smoke("--devices", "cpu=512MiB,cpu=512MiB", "--layers", "3,3")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Paris" in ended.stdout and "WRONG" not in ended.stdout


def test_one_that_does_not_start_fails() -> None:
    ended = smoke("--model", "/there/is/none")
    assert ended.returncode != 0
    assert "before it was ready" in ended.stderr
