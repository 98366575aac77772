"""codex, which runs a command that the model asks for."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import TOLD, check, program, served

scripted = served("scripted")
HOME = Path(tempfile.mkdtemp())
(HOME / ".codex").mkdir()
(HOME / ".codex" / "config.toml").write_text(
    f'model = "{scripted.model}"\nmodel_provider = "own"\n[model_providers.own]\nname = "own"\n'
    f'base_url = "{scripted.v1}"\nenv_key = "KEY"\nwire_api = "responses"\n'
)


@check("exec: a call of its shell", on="scripted")
def _() -> Any:
    flags = ("--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "--json")
    said = program("codex", "exec", *flags, "Say hello", home=HOME, KEY=scripted.token)
    assert "out of the tool" in said, said[-300:]
    assert TOLD in said, said[-300:]
    return TOLD
