"""opencode, which runs a tool of its own that the model calls."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from common import TOLD, check, program, served

scripted = served("scripted")
HOME = Path(tempfile.mkdtemp())
(HOME / "opencode.json").write_text(
    json.dumps({
        "$schema": "https://opencode.ai/config.json",
        "autoupdate": False,
        "share": "disabled",
        "provider": {
            "vramancer": {
                "npm": "@ai-sdk/openai-compatible",
                "name": "VRAMancer",
                "options": {"baseURL": scripted.v1, "apiKey": scripted.token},
                "models": {scripted.model: {"name": scripted.model, "limit": {"context": 65536, "output": 512}}},
            }
        },
    })
)  # fmt: skip


@check("run: a call of its tool bash", on="scripted")
def _() -> Any:
    said = program("opencode", "run", "--format", "json", "-m", f"vramancer/{scripted.model}", "Say hello", home=HOME)
    parts = [json.loads(line)["part"] for line in said.splitlines() if '"part"' in line]
    ran = [part["state"] for part in parts if part["type"] == "tool"]
    assert ran and "out of the tool" in ran[0]["output"], said[-300:]
    assert [part["text"] for part in parts if part["type"] == "text"][-1] == TOLD, said[-300:]
    return TOLD
