"""Warnings are errors in these tests, but for Triton's own."""

from __future__ import annotations

import types

import pytest


def warn_from(name: str) -> None:
    """As if a module of this name warned."""
    module = types.ModuleType(name)
    exec(compile("import warnings\nwarnings.warn('the next release', UserWarning)", f"{name}.py", "exec"), vars(module))


@pytest.mark.parametrize("name", ["triton", "triton.runtime.jit"])
def test_a_triton_that_warns_fails_nothing(name: str) -> None:
    warn_from(name)


@pytest.mark.parametrize("name", ["core.execution.attention.triton_paged", "tritonic", "torch.utils.triton"])
def test_others_do(name: str) -> None:
    with pytest.raises(UserWarning, match="the next release"):
        warn_from(name)
