"""The configurations that docs/scale.md shows are ones that nginx and HAProxy take; skipped where they are missing."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

_PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


def _block(language: str) -> str:
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", _PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return str(text)


def test_nginx_takes_its_configuration(tmp_path: Path) -> None:
    program = shutil.which("nginx")
    if program is None:
        pytest.skip("nginx is not installed")
    path = tmp_path / "nginx.conf"
    path.write_text(_block("nginx"))
    command = [
        program,
        "-t",
        "-p",
        str(tmp_path),
        "-c",
        str(path),
        "-g",
        f"pid {tmp_path}/nginx.pid; error_log stderr;",
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "syntax is ok" in said.stderr  # its folder for temporary files may be another user's


def test_haproxy_takes_its_configuration(tmp_path: Path) -> None:
    program = shutil.which("haproxy")
    if program is None:
        pytest.skip("HAProxy is not installed")
    path = tmp_path / "haproxy.cfg"
    path.write_text(_block("haproxy"))
    said = subprocess.run([program, "-c", "-f", str(path)], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
