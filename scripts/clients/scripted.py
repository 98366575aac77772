"""A model that says what a script has, whatever it is told: it thinks, calls a tool that it is offered, and answers
once it has the result. So what clients make of its answers depends on the server alone.

Its chat template leaves out what is said, since the instructions of coding agents are longer than its context.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.scripted_models import build_scripted  # noqa: E402

SHELL = "echo out of the tool"


def call(name: str, **arguments: Any) -> str:
    """As Hermes's models write it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


OWN_TOOLS = {
    "Bash": {"command": SHELL, "description": "Says hello"},  # Claude Code
    "bash": {"command": SHELL, "description": "Says hello"},  # opencode
    "exec_command": {"cmd": SHELL},  # codex
    "shell_command": {"command": SHELL},
    "llm_version": {},
}
"""Tools of programs, and what they are called with."""
SCRIPTS = {
    "[GREET]": ["<think>", "It is a greeting.", "</think>", "Hello from the ", "scripted model."],
    "[WEATHER]": [
        "<think>\n", "Which city?", "\n</think>", "I look.",
        '<tool_call>\n{"name": "weather", ', '"arguments": {"city": ', '"Oslo"}}\n', "</tool_call>",
    ],
    "[TOLD]": ["It rains ", "in Oslo."],
    "[STEP]": [call("weather", city="Lima")],
    "[FINAL]": [call("final_answer", answer="It rains in Lima.")],
    **{f"[{name}]": ["I look." + call(name, **arguments)] for name, arguments in OWN_TOOLS.items()},
}  # fmt: skip
TEMPLATE = (
    "{%- set names = (tools or []) | map(attribute='function') | map(attribute='name') | list -%}"
    "{%- set last = messages[-1] -%}"
    "[INST]{{ last.role }}"
    "{%- if 'final_answer' in names and 'Observation' in (last.content or '') -%}[FINAL]"
    "{%- elif 'final_answer' in names -%}[STEP]"  # of smolagents, which requires a call, so that no text is before it
    "{%- elif last.role == 'tool' -%}[TOLD]"
    "{%- elif 'weather' in names -%}[WEATHER]"
    + "".join(f"{{%- elif '{name}' in names -%}}[{name}]" for name in OWN_TOOLS)
    + "{%- else -%}[GREET]{%- endif -%}"
    "{#- <tool_call> <think> </think> -#}"
)  # fmt: skip


def build(directory: Path) -> None:
    """Save the model."""
    (begin, script), *others = SCRIPTS.items()
    build_scripted(directory, begin, script, TEMPLATE, special=["[INST]"], others=dict(others))


FLAGS = ("--tool-parser", "hermes", "--reasoning-parser", "think")
"""Of the server, beside the model."""
