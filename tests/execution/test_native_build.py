"""What is said while kernels are built."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from core.execution.native import build

LINE = "building CPU kernels, once, about half a minute"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Log lines of a build that takes no time: a compiler that accepts no flags but `-O1`."""

    def compile_at_once(compiler: list[str], flags: list[str], target: Path) -> str | None:
        if flags != ["-O1"]:
            return f"unknown flag {flags}"
        target.write_bytes(b"")
        return None

    monkeypatch.setattr(build, "find_compilers", lambda: [["cc"]])
    monkeypatch.setattr(build, "_run", lambda command: (True, "1.0"))
    monkeypatch.setattr(build, "_compile", compile_at_once)
    caplog.set_level(logging.INFO)
    return caplog


def lines(said: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in said.records if record.name == build.__name__]


def test_one_line_says_that_kernels_are_built(said: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    assert build.build_library(tmp_path, [["-march=other"], ["-O1"]]) is not None
    assert len(lines(said)) == 1 and LINE in lines(said)[0]


def test_nothing_is_said_where_they_are_there(said: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    first = build.build_library(tmp_path, [["-O1"]])
    said.clear()
    assert build.build_library(tmp_path, [["-O1"]]) == first
    assert lines(said) == []
