"""Fixtures of the dashboard's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from boards import Board


@pytest.fixture
def make_board(tmp_path: Path) -> Iterator[Callable[..., Board]]:
    made: list[Board] = []

    def make(gateway: Any = None, **settings: Any) -> Board:
        made.append(Board(tmp_path, gateway, **settings))
        return made[-1]

    yield make
    for board in made:
        board.close()


@pytest.fixture
def board(make_board: Callable[..., Board]) -> Board:
    return make_board()
