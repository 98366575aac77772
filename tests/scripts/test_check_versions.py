"""The script that tests both ends of the version ranges."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytest.importorskip("tomllib")

import check_versions
from check_versions import Outcome, constraints, direct_dependencies, lower_bound, read_table, render_table

PROJECT = """
[project]
dependencies = ["flask>=3.1,<4", "rich", "numpy==2.1.0", "winonly>=1; sys_platform == 'win32'"]
[project.optional-dependencies]
test = ["pytest>=8.4"]
dev = ["ruff>=0.17"]
"""


def test_the_lowest_versions_are_the_lower_bounds() -> None:
    found = direct_dependencies(PROJECT)
    assert [each.name for each in found] == ["flask", "rich", "numpy", "pytest"]
    assert [lower_bound(each) for each in found] == ["3.1", None, "2.1.0", "8.4"]
    assert constraints("lowest", found, []) == ["flask==3.1", "numpy==2.1.0", "pytest==8.4"]
    assert constraints("newest", found, []) == []


def test_a_pin_comes_before_the_bound() -> None:
    found = direct_dependencies(PROJECT)
    assert constraints("lowest", found, [Requirement("Flask==3.1.2")])[0] == "Flask==3.1.2"
    assert "flask==3.1" not in constraints("lowest", found, [Requirement("Flask==3.1.2")])


def test_every_dependency_has_a_lower_bound() -> None:
    text = (check_versions.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert [each.name for each in direct_dependencies(text) if lower_bound(each) is None] == []


def test_one_column_is_replaced_and_the_other_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "versions.md"
    page.write_text("before\n<!-- table -->\n| package | lowest | newest |\n|---|---|---|\n<!-- end -->\nafter\n")
    monkeypatch.setattr(check_versions, "TABLE", page)
    low = Outcome("3.10.1", {"flask": "3.1.0", "rich": "13.9.0"}, "7 passed")
    high = Outcome("3.13.0", {"flask": "3.1.3", "rich": "15.0.0"}, "8 passed")
    check_versions.write_table("lowest", low, ["flask", "rich"])
    check_versions.write_table("newest", high, ["flask", "rich"])
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "| flask | 3.1.0 | 3.1.3 |" in text and "| tests | 7 passed | 8 passed |" in text
    assert read_table(text) == {"lowest": low, "newest": high}
    assert render_table({"lowest": low}, ["rich"]).splitlines()[3] == "| rich | 13.9.0 |  |"
