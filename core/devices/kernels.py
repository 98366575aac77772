"""Which chips the kernels of a torch build run on. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

_ON_BOARDS = {(5, 3), (6, 2), (7, 2), (8, 7), (10, 1)}
"""NVIDIA's chips for embedded boards share no machine code with the others of their generation."""


def runs_on_nvidia(major: int, minor: int, kernels: Sequence[str]) -> bool:
    """Whether a card of that compute capability runs one of `kernels` (`torch.cuda.get_arch_list()`).

    Machine code (sm_86) runs on the same major and newer minors, with an "a" behind it on the same alone; PTX
    (compute_90) is compiled for anything newer. An unknown list runs.
    """
    parsed = [match for kernel in kernels if (match := re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", kernel))]
    for what, its_major, its_minor, variant in (match.groups() for match in parsed):
        theirs, ours = (int(its_major), int(its_minor)), (major, minor)
        if theirs == ours or (what == "compute" and not variant and theirs <= ours):
            return True
        if theirs[0] == major and theirs[1] <= minor and variant != "a" and not _ON_BOARDS & {theirs, ours}:
            return True
    return not parsed


def runs_on_amd(chip: str, kernels: Sequence[str]) -> bool:
    """Whether an AMD chip such as "gfx1100" is among `kernels`, or of a family that is ("gfx11-generic")."""
    families = [name.removesuffix("-generic").replace("-", "") for name in kernels if name.endswith("-generic")]
    return not kernels or chip in kernels or any(chip.startswith(family) for family in families)
