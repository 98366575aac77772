"""The pictures in the documentation are what the programs draw."""

from __future__ import annotations

import pytest

from scripts.captures import ROOT, WIDTHS, captures


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["banner", "dashboard", "doctor", "fit", "plan", "run", "status"])
def test_the_documented_pictures_are_the_drawn_ones(name: str, width: int) -> None:
    file = f"{name}-{width}.txt"
    shown = (ROOT / "docs" / "terminal" / file).read_text(encoding="utf-8")
    assert captures()[file] == shown, "run scripts/captures.py"
