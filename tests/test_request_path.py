"""How many files a chat request crosses, counted by `scripts/trace_request.py`."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from plain_settings import CACHE_DIR

from core.request import SamplingParams

SCRIPT = Path(__file__).parent.parent / "scripts" / "trace_request.py"
MOST = 40
"""Files that a request may cross."""


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trace_request", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_chat_request_crosses_few_files() -> None:
    """One file at least of each thing that a request passes on its way, in that order."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--max", str(MOST), "--cache-dir", str(CACHE_DIR), "--max-tokens", "8"],
        capture_output=True, text=True, timeout=600, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    files = re.findall(r"^ *\d+  (\S+)", done.stdout, re.MULTILINE)
    assert done.stdout.endswith(f"\n{len(files)} files\n")
    names = (
        "api/openai/chat", "inference_pipeline", "batching/batcher", "batching/scheduler", "execution/stage",
        "execution/results", "metrics/registry",
    )  # fmt: skip
    way = [f"core/{name}.py" for name in names]
    assert [file for file in files if file in way] == way


@pytest.mark.parametrize(("most", "status"), [("3", 0), ("2", 1)])
def test_more_files_than_are_allowed_are_an_error(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], most: str, status: int
) -> None:
    monkeypatch.setattr(script, "trace_request", lambda *given: {"a.py": "f", "b.py": "g", "c.py": "h"})
    monkeypatch.setattr(sys, "argv", ["trace_request.py", "--max", most])
    assert script.main() == status
    assert "3 files" in capsys.readouterr().out


@pytest.fixture
def traced(script: ModuleType) -> Callable[[Callable[[], object]], list[str]]:
    """Runs a function in a thread, recorded, and gives the files that it entered."""

    def run(function: Callable[[], object]) -> list[str]:
        trace = script.FileTrace()
        trace.install()
        try:
            SamplingParams().validate(10)
            thread = threading.Thread(target=function)
            with trace.recording():
                thread.start()
                thread.join()
            SamplingParams().validate(10)
        finally:
            trace.uninstall()
        return list(trace.files)

    return run


def test_functions_of_our_files_count_in_every_thread(traced: Callable[[Callable[[], object]], list[str]]) -> None:
    assert traced(lambda: SamplingParams().validate(10)) == ["core/request.py"]
    assert traced(lambda: re.sub("a", "b", "abc")) == [], "nothing before, nothing after, and nobody else's"
