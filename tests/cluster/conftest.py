"""Fixtures of the cluster's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.machines import open_master
from tiny_models import build_tiny

from core.cluster.master import Master


@pytest.fixture
def master() -> Iterator[Master]:
    made = open_master()
    yield made
    made.close()


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    build_tiny("llama", path)
    return path
