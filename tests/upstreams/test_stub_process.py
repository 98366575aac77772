"""A server whose model cannot be loaded, as a process: with leave a stub answers, else it does not start."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from api.api_client import TOKEN
from steering import LONGEST_WAIT_S
from upstreams.servers import CHAT

from core.upstreams.stub import STUB_TEXT


def command(tmp_path: Path, **environ: str) -> subprocess.Popen[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VRM_")}
    own = {"HOME": str(tmp_path), "VRM_API_TOKEN": TOKEN, "VRM_API_PORT": "0", "VRM_METRICS_PORT": "0", **environ}
    arguments = [sys.executable, "-m", "vramancer.main", "--api", "--model", str(tmp_path / "nothing-here")]
    return subprocess.Popen(
        arguments, env=inherited | own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip


@pytest.mark.slow
def test_the_stub_answers_where_no_model_can_be_loaded(tmp_path: Path) -> None:
    with command(tmp_path, VRM_BACKEND_ALLOW_STUB="1") as process:
        try:
            assert process.stdout is not None
            said = ""
            while "Ctrl-C" not in said and (line := process.stdout.readline()):
                said += line
            found = re.search(r"http://127\.0\.0\.1:\d+", said)
            assert found is not None and "stub" in said and "no model could be loaded" in said, said
            headers = {"X-API-TOKEN": TOKEN, "Content-Type": "application/json"}
            asked = urllib.request.Request(f"{found[0]}/v1/chat/completions", json.dumps(CHAT).encode(), headers)
            with urllib.request.urlopen(asked, timeout=LONGEST_WAIT_S) as answer:
                assert json.load(answer)["choices"][0]["message"]["content"] == STUB_TEXT
        finally:
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=LONGEST_WAIT_S)
    assert "a stub answers" in errors


@pytest.mark.slow
@pytest.mark.parametrize("environ", [{}, {"VRM_BACKEND_ALLOW_STUB": "1", "VRM_PRODUCTION": "1"}])
def test_otherwise_the_server_does_not_start(tmp_path: Path, environ: dict[str, str]) -> None:
    with command(tmp_path, **environ) as process:
        said, errors = process.communicate(timeout=LONGEST_WAIT_S)
    assert process.returncode != 0
    assert "stub" not in said
    assert ("backend.allow_stub" in errors) == bool(environ)
