"""aider, which sends its own instructions with each message."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import GREETING, check, program, served

scripted = served("scripted")
HOME = Path(tempfile.mkdtemp())

for stream in ("--stream", "--no-stream"):

    @check(f"--message, {stream}", on="scripted")
    def _(stream: str = stream) -> Any:
        said = program(
            "aider", "--model", f"openai/{scripted.model}", "--openai-api-base", scripted.v1, "--openai-api-key",
            scripted.token, "--message", "Say hello", "--no-git", "--yes-always", "--no-check-update",
            "--analytics-disable", "--no-show-model-warnings", "--no-pretty", "--no-browser", stream, home=HOME,
        )  # fmt: skip
        assert GREETING in said, said[-300:]
        return GREETING
