#!/usr/bin/env python3
"""Install the lowest, or the newest, allowed version of every direct dependency, and run the tests that would notice.

    python scripts/check_versions.py lowest
    python scripts/check_versions.py newest
    python scripts/check_versions.py lowest --pin torch==2.13.0     a version that this machine has to have

Golden, model and API tests run in an environment of their own, in a folder that is deleted afterwards (--keep keeps
it). The versions found and the outcome replace the column of that name in docs/versions.md. torch from PyPI brings
CUDA: several GB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass, field
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "versions.md"
TESTS = ("tests/golden", "tests/models", "tests/api")
KINDS = ("lowest", "newest")
_BEGIN, _END = "<!-- table -->", "<!-- end -->"
_SETTINGS = {"VRM_MINIMAL_TEST": "1", "VRM_DISABLE_RATE_LIMIT": "1", "VRM_TEST_MODE": "1"}


def direct_dependencies(text: str, extras: tuple[str, ...] = ("test",)) -> list[Requirement]:
    """What `pyproject.toml` asks for on this system, by itself and for the tests."""
    project = tomllib.loads(text)["project"]
    lines = [*project["dependencies"], *(line for name in extras for line in project["optional-dependencies"][name])]
    found = [Requirement(line) for line in lines]
    own = [each for each in found if canonicalize_name(each.name) == project.get("name")]  # vramancer[another extra]
    found = [each for each in found if each not in own]
    for each in own:
        found += [Requirement(line) for extra in each.extras for line in project["optional-dependencies"][extra]]
    return [each for each in found if each.marker is None or each.marker.evaluate()]


def lower_bound(requirement: Requirement) -> str | None:
    """The lowest version allowed; None if there is no bound."""
    bounds = [part.version for part in requirement.specifier if part.operator in (">=", "==", "~=")]
    return bounds[0] if bounds else None


def constraints(kind: str, dependencies: list[Requirement], pins: list[Requirement]) -> list[str]:
    """Lines of a constraints file; `pins` come before bounds."""
    pinned = {canonicalize_name(pin.name) for pin in pins}
    lines = [str(pin) for pin in pins]
    if kind == "lowest":
        bounds = [(each, lower_bound(each)) for each in dependencies if canonicalize_name(each.name) not in pinned]
        lines += [f"{each.name}=={bound}" for each, bound in bounds if bound is not None]
    return lines


@dataclass(slots=True)
class Outcome:
    """What one kind of versions came to: by package, and the last line of the tests."""

    python: str
    versions: dict[str, str] = field(default_factory=dict)
    tests: str = ""


def install(folder: Path, lines: list[str]) -> Path:
    """An environment with VRAMancer, its tests' needs and these constraints; its interpreter."""
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    limits = folder / "constraints.txt"
    limits.write_text("\n".join(lines) + "\n", encoding="utf-8")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", limits, "-e", f"{ROOT}[test]"], check=True)
    return python


def installed(python: Path) -> dict[str, str]:
    """Every package there, by canonical name."""
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return {canonicalize_name(each["name"]): each["version"] for each in json.loads(listed.stdout)}


def run_tests(python: Path, tests: list[str]) -> tuple[int, str]:
    """Exit status, and pytest's last line without its time."""
    options = ("-q", "--no-cov", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider")
    command = [python, "-m", "pytest", *tests, *options]
    told = {name: value for name, value in os.environ.items() if not name.startswith("VRM_")}
    done = subprocess.Popen(command, cwd=ROOT, env=told | _SETTINGS, stdout=subprocess.PIPE, text=True)
    assert done.stdout is not None
    last = ""
    for line in done.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    return done.wait(), re.sub(r" in [\d.]+s.*", "", last)


def read_table(text: str) -> dict[str, Outcome]:
    """What the page says of each kind."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    found = {}
    for column, kind in enumerate(KINDS, start=1):
        cells = {row[0]: row[column] for row in rows[2:] if len(row) > column}
        if cells.get("Python"):
            found[kind] = Outcome(cells.pop("Python"), tests=cells.pop("tests", ""), versions=cells)
    return found


def render_table(found: dict[str, Outcome], names: list[str]) -> str:
    """The table, a package a row."""

    def cells(name: str) -> str:
        return " | ".join(found[kind].versions.get(name, "") if kind in found else "" for kind in KINDS)

    outcomes = [[getattr(found[kind], what) if kind in found else "" for kind in KINDS] for what in ("python", "tests")]
    return "\n".join([
        f"| package | {' | '.join(KINDS)} |", "|---|---|---|", f"| Python | {' | '.join(outcomes[0])} |",
        *(f"| {name} | {cells(name)} |" for name in names), f"| tests | {' | '.join(outcomes[1])} |",
    ])  # fmt: skip


def write_table(kind: str, outcome: Outcome, names: list[str]) -> None:
    """Replace one column of the page."""
    text = TABLE.read_text(encoding="utf-8")
    before, rest = text.split(_BEGIN)
    table, after = rest.split(_END)
    found = read_table(table) | {kind: outcome}
    TABLE.write_text(f"{before}{_BEGIN}\n{render_table(found, names)}\n{_END}{after}", encoding="utf-8")


def main() -> None:
    """Install, test, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--pin", action="append", default=[], type=Requirement, help="NAME==VERSION instead")
    parser.add_argument("--keep", type=Path, help="folder for the environment, kept")
    parser.add_argument("--tests", nargs="+", default=list(TESTS), help="what to run (default: %(default)s)")
    given = parser.parse_args()
    dependencies = direct_dependencies((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if given.keep is None else given.keep
        folder.mkdir(parents=True, exist_ok=True)
        python = install(folder, constraints(given.kind, dependencies, given.pin))
        names = sorted({canonicalize_name(each.name) for each in dependencies})
        everything = installed(python)
        status, line = run_tests(python, given.tests)
        versions = {name: everything[name] for name in names}
        write_table(given.kind, Outcome(platform.python_version(), versions, line), names)
    sys.exit(status)


if __name__ == "__main__":
    main()
