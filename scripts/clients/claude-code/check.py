"""Claude Code, which runs a command that the model asks for."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import TOLD, check, program, served

scripted = served("scripted")
HOME = Path(tempfile.mkdtemp())


@check("-p: a call of its tool Bash", on="scripted")
def _() -> Any:
    flags = ("--model", scripted.model, "--allowedTools", "Bash", "--output-format", "stream-json", "--verbose")
    said = program(
        "claude", "-p", "Say hello", *flags, home=HOME, ANTHROPIC_BASE_URL=scripted.url,
        ANTHROPIC_API_KEY=scripted.token, CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1", DISABLE_AUTOUPDATER="1",
    )  # fmt: skip
    assert '"tool_result"' in said and "out of the tool" in said, said[-300:]
    assert TOLD in said.splitlines()[-1], said[-300:]
    return TOLD
