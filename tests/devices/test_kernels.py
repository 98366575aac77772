"""Which chips a torch build's kernels run on."""

from __future__ import annotations

import pytest

from core.devices.kernels import runs_on_amd, runs_on_nvidia

WHEEL = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "kernels", "runs"),
    [
        ((7, 5), WHEEL, True),
        ((8, 9), WHEEL, True),  # sm_86's code
        ((12, 1), WHEEL, True),
        ((13, 0), WHEEL, True),  # from PTX
        ((13, 0), WHEEL[:-1], False),
        ((6, 1), WHEEL, False),
        ((7, 0), WHEEL, False),  # older than sm_75
        ((8, 7), WHEEL, False),  # a board
        ((8, 7), ["sm_87"], True),
        ((8, 9), ["sm_87"], False),
        ((8, 7), ["compute_80"], True),
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_100a"], False),
        ((10, 3), ["sm_100f"], True),
        ((12, 0), ["compute_90a"], False),
        ((3, 5), [], True),  # a torch that does not say
    ],
)
def test_which_nvidia_cards_run(capability: tuple[int, int], kernels: list[str], runs: bool) -> None:
    assert runs_on_nvidia(*capability, kernels) == runs


@pytest.mark.parametrize(
    ("chip", "runs"), [("gfx1100", True), ("gfx942", True), ("gfx906", False), ("gfx1201", True), ("gfx1150", False)]
)
def test_which_amd_cards_run(chip: str, runs: bool) -> None:
    assert runs_on_amd(chip, ["gfx90a", "gfx942", "gfx1100", "gfx12-generic"]) == runs
    assert runs_on_amd(chip, [])
