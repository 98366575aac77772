"""The files of `monitoring/`, as the tests read them."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
MONITORING = REPOSITORY / "monitoring"
RULES = MONITORING / "prometheus" / "rules"
RULE_TESTS = MONITORING / "prometheus" / "tests"
ALERTMANAGER = MONITORING / "alertmanager" / "alertmanager.yml"
BOARD = MONITORING / "grafana" / "dashboards" / "vramancer.json"
GUIDE = REPOSITORY / "docs" / "monitoring.md"

PROGRAMS = {
    "promtool": ("promtool",),
    "prometheus": ("prometheus",),
    "amtool": ("amtool",),
    "alertmanager": ("prometheus-alertmanager", "alertmanager"),
}
"""Names under which programs may be installed; Debian calls one of them otherwise."""


def program(name: str) -> str:
    """The path of a program; without it, the test is skipped."""
    found = next((path for each in PROGRAMS[name] if (path := shutil.which(each))), None)
    if found is None:
        pytest.skip(f"{name} is not installed; scripts/system_packages installs it")
    return found


def run(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [program(name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@functools.cache
def rule_groups() -> list[dict[str, Any]]:
    return [group for file in sorted(RULES.glob("*.yml")) for group in read_yaml(file)["groups"]]


def alerts() -> dict[str, dict[str, Any]]:
    """Alert rules by name."""
    return {rule["alert"]: rule for group in rule_groups() for rule in group["rules"] if "alert" in rule}


def recorded() -> dict[str, str]:
    """Expressions by the names under which they are recorded."""
    return {rule["record"]: rule["expr"] for group in rule_groups() for rule in group["rules"] if "record" in rule}


@functools.cache
def board() -> dict[str, Any]:
    made: dict[str, Any] = json.loads(BOARD.read_text(encoding="utf-8"))
    return made


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """Of all rows, collapsed ones included, and not the rows themselves."""
    every = [inner for panel in board["panels"] for inner in (panel, *panel.get("panels", ()))]
    return [panel for panel in every if panel["type"] != "row"]


def as_grafana_asks(expression: str) -> str:
    """A panel's query with everything chosen, over a window that covers a test."""
    for variable, value in (("$__rate_interval", "5m"), ("$instance", ".+"), ("$gpu", ".+")):
        expression = expression.replace(variable, value)
    return expression


def metric_names(expression: str) -> set[str]:
    """The metrics of VRAMancer that a PromQL expression asks for, and names that are recorded by rules."""
    bare = re.sub(r'"[^"]*"', '""', expression)  # without values of labels
    return {name for name in re.findall(r"[a-z_][\w:]*", bare) if "vramancer_" in name or name.startswith("vllm:")}
