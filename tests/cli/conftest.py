"""Fixtures of the commands' tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli.fake_server import fake_server

from core.config import iter_settings


@pytest.fixture
def server() -> Iterator[Any]:
    with fake_server() as running:
        yield running


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A token, and nothing else configured; files are kept below `tmp_path`."""
    for info in iter_settings():
        monkeypatch.delenv(info.env, raising=False)
    for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VRM_API_TOKEN", "secret")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
