"""Simon Willison's `llm`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from common import CITY, QUESTION, TOLD, check, hoped, in_cities, program, served

HOME = Path(tempfile.mkdtemp())
USER = HOME / "llm"
USER.mkdir()
(USER / "extra-openai-models.yaml").write_text(
    json.dumps([
        {
            "model_id": name, "model_name": served(name).model, "api_base": served(name).v1, "api_key_name": name,
            "supports_tools": True, "supports_schema": True,
        }
        for name in ("demo", "scripted")
    ])
)  # fmt: skip
(USER / "keys.json").write_text(json.dumps({name: served(name).token for name in ("demo", "scripted")}))
LIMIT = ("-o", "temperature", "0", "-o", "max_tokens", "1000")


def llm(*arguments: str) -> str:
    return program("llm", *arguments, home=HOME, LLM_USER_PATH=str(USER)).strip()


@check("prompt, streamed")
def _() -> Any:
    return hoped(llm("-m", "demo", *LIMIT, QUESTION))


@check("prompt, whole")
def _() -> Any:
    return hoped(llm("-m", "demo", "--no-stream", *LIMIT, QUESTION))


@check("--schema", constrained=True)
def _() -> Any:
    return in_cities(llm("-m", "demo", *LIMIT, "--schema", json.dumps(CITY), "Weather in Oslo?"))


for stream in ((), ("--no-stream",)):

    @check(f"-T llm_version {' '.join(stream)}".strip(), on="scripted")
    def _(stream: tuple[str, ...] = stream) -> Any:
        said = llm("-m", "scripted", "-T", "llm_version", *stream, "Which version?")
        assert said.endswith(TOLD), said
        return said
