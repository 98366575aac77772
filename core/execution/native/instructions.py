"""Which of the processor's instructions the kernels are built with, and what they are then the faster way for."""

from __future__ import annotations

import platform
from typing import Literal

import torch

from core.errors import ConfigError

Instructions = Literal["native", "avx2"]
"""native: all that this processor has. avx2: those of an x86-64 processor before AVX-512."""

EVERY_ROW = 1 << 30
_AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")


def is_x86() -> bool:
    """Whether this is an x86-64 processor."""
    return platform.machine() in ("x86_64", "AMD64")


def compiler_flags(instructions: Instructions) -> list[list[str]]:
    """Sets of flags to try, best first. Raises ConfigError where the processor lacks the instructions."""
    if instructions == "avx2":
        if not (is_x86() and torch.cpu._is_avx2_supported()):
            raise ConfigError(
                "engine.cpu_instructions is avx2, which this processor does not have; leave it at native",
                param="engine.cpu_instructions",
            )
        return [list(_AVX2_FLAGS)]
    return [["-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"], []]


def max_rows(instructions: Instructions) -> dict[torch.dtype, int]:
    """Rows of x up to which the kernel beats `F.linear`.

    Measured on two Zen 3 cores (AVX2), torch 2.13: bf16 1.5 x at 1 row, 4 x at 4, 5 x from 16 to 2048; fp16 1.1 x at 1,
    4 x and more from 16; fp32 1.4 x at 1, 3 x at 4, 1.5 x at 16, 1.1 x at 32, 0.9 x at 64. With bf16 instructions torch
    has faster matrix products; rows that share one read of the weights stay with the kernel.
    """
    half = 4 if instructions == "native" and _multiplies_halves() else EVERY_ROW
    return {torch.bfloat16: half, torch.float16: half, torch.float32: 32}


def _multiplies_halves() -> bool:
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in probes) or platform.machine() in ("arm64", "aarch64")


def do_all_products(dtype: torch.dtype, instructions: Instructions) -> bool:
    """Whether every linear layer of `dtype` runs in the kernels, whatever its number of rows."""
    return max_rows(instructions).get(dtype, 0) >= EVERY_ROW


def packs_weights(dtype: torch.dtype, instructions: Instructions) -> bool:
    """Whether weights of this dtype are better packed, if the kernels can be built.

    `NativeKernels.packs` says whether they can pack.
    """
    return dtype is torch.bfloat16 and do_all_products(dtype, instructions) and is_x86()
