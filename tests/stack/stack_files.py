"""The files of the container stack, read as Docker and Compose read them, as far as the tests need it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[2]
COMPOSE_FILES = ("docker-compose.yml", "docker-compose.devices.yml")
BACKENDS = ("cuda", "rocm", "cpu")


@cache
def compose(name: str = "docker-compose.yml") -> dict[str, Any]:
    """One Compose file as it stands, nothing put in for its variables."""
    return dict(yaml.safe_load((REPOSITORY / name).read_text(encoding="utf-8")))


def services() -> dict[str, dict[str, Any]]:
    return dict(compose()["services"])


@dataclass(frozen=True, slots=True)
class Stage:
    """One `FROM … AS name` of the Dockerfile, with its other instructions as (instruction, rest of the line)."""

    base: str
    name: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [rest for found, rest in self.instructions if found == instruction]

    def last(self, instruction: str) -> str:
        return self.all(instruction)[-1]

    @property
    def environment(self) -> dict[str, str]:
        pairs = [word.partition("=") for rest in self.all("ENV") for word in rest.split()]
        return {name: value for name, _, value in pairs}


@cache
def dockerfile() -> tuple[dict[str, str], list[Stage]]:
    """Arguments before the first stage with their defaults, and the stages."""
    text = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            stages.append(Stage(base, name))
        elif stages and instruction:
            stages[-1].instructions.append((instruction, rest))
        elif instruction == "ARG":
            name, _, default = rest.partition("=")
            arguments[name] = default
    return arguments, stages


def health_command() -> list[str]:
    """What the image's HEALTHCHECK runs."""
    words = json.loads(dockerfile()[1][-1].last("HEALTHCHECK").partition("CMD ")[2])
    return [str(word) for word in words]


def packages() -> set[str]:
    """The folders that an installation of VRAMancer consists of."""
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r"^\[tool\.setuptools\.packages\.find\]\ninclude = \[(.*)\]$", text, re.MULTILINE)
    assert found is not None
    patterns = re.findall(r'"([^"]+)"', found[1])
    return {path.parent.name for pattern in patterns for path in REPOSITORY.glob(f"{pattern}/__init__.py")}
