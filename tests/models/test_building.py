"""Models that are made in several threads at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import build_tiny

from core.models.architecture import read_architecture
from core.models.stage_model import blank_model

THREADS, MODELS = 6, 60


@pytest.fixture
def hurried() -> Iterator[None]:
    """Threads take turns often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hurried")
def test_each_has_its_own_dtype(tmp_path: Path) -> None:
    """A server that serves may measure for nodes that join while it loads: in another thread, with another dtype."""
    build_tiny("llama", tmp_path)
    architecture = read_architecture(tmp_path)
    dtypes = [(torch.bfloat16, torch.float16, torch.float32)[number % 3] for number in range(MODELS)]

    def made(dtype: torch.dtype) -> set[torch.dtype]:
        return {parameter.dtype for parameter in blank_model(replace(architecture, dtype=dtype)).parameters()}

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(made, dtypes)) == [{dtype} for dtype in dtypes]
    assert torch.get_default_dtype() is torch.float32
