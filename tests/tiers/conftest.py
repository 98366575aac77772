"""Fixtures of the tests of memory tiers."""

from __future__ import annotations

import pytest
from memory_helpers import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()
