"""Which of the processor's instructions the kernels are built with, and what they are then the faster way for."""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Literal

import torch

from core.errors import ConfigError

Instructions = Literal["native", "avx512", "avx2"]
"""native: all that this processor has. avx512: those of an x86-64 processor before AMX. avx2: before AVX-512."""

EVERY_ROW = 1 << 30
FEW_ROWS = 4
_AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
_CPUINFO = Path("/proc/cpuinfo")
_AVX512_FLAGS = (*_AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")


def is_x86() -> bool:
    """Whether this is an x86-64 processor."""
    return platform.machine() in ("x86_64", "AMD64")


def compiler_flags(instructions: Instructions) -> list[list[str]]:
    """Sets of flags to try, best first. Raises ConfigError where the processor lacks the instructions."""
    if instructions != "native":
        if not (is_x86() and (_has_avx512() if instructions == "avx512" else torch.cpu._is_avx2_supported())):
            raise ConfigError(
                f"engine.cpu_instructions is {instructions}, which this processor does not have; leave it at native",
                param="engine.cpu_instructions",
            )
        if instructions == "avx2":
            return [list(_AVX2_FLAGS)]
        return [[*_AVX512_FLAGS, "-mavx512bf16"]] if _supported("_is_avx512_bf16_supported") else [list(_AVX512_FLAGS)]
    return [["-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"], []]


def _supported(name: str) -> bool:
    """What torch, of which not every version knows all of these, says of this processor."""
    return bool(getattr(torch.cpu, name, bool)())


def _has_avx512() -> bool:
    return _supported("_is_avx512_supported")


@functools.cache
def _is_intel() -> bool:
    return _CPUINFO.is_file() and "GenuineIntel" in _CPUINFO.read_text(errors="replace")


def has_bf16_products(instructions: Instructions) -> bool:
    """Whether the kernels multiply bf16 weights as they are, by instructions of the processor's own (`halves.c`).

    Intel's AVX-512 multiplies bf16 at half the pace of 16-bit integers (two cores, 16 rows: 128 ms a step of a
    442M-parameter model, packed weights 85 ms), so there it takes AMX (53 ms).
    """
    if instructions == "avx2" or not is_x86() or not _supported("_is_avx512_bf16_supported"):
        return False
    return not _is_intel() or (instructions == "native" and _supported("_is_amx_tile_supported"))


def max_rows(instructions: Instructions) -> dict[torch.dtype, int]:
    """Rows of x up to which the kernel beats `F.linear`.

    Measured on two Zen 3 cores (AVX2), torch 2.13: bf16 1.5 x at 1 row, 4 x at 4, 5 x from 16 to 2048; fp16 1.1 x at 1,
    4 x and more from 16; fp32 1.4 x at 1, 3 x at 4, 1.5 x at 16, 1.1 x at 32, 0.9 x at 64. On two cores with AMX: bf16
    1.2 x up to 32 rows, about 1 beyond. Where other processors have instructions for bf16, torch has faster matrix
    products; rows that share one read of the weights stay with the kernel.
    """
    half = FEW_ROWS if instructions != "avx2" and _multiplies_halves() else EVERY_ROW
    return {torch.bfloat16: EVERY_ROW if is_x86() else half, torch.float16: half, torch.float32: 32}


def _multiplies_halves() -> bool:
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(_supported(name) for name in probes) or platform.machine() in ("arm64", "aarch64")


def do_all_products(dtype: torch.dtype, instructions: Instructions) -> bool:
    """Whether every linear layer of `dtype` runs in the kernels, whatever its number of rows."""
    return max_rows(instructions).get(dtype, 0) >= EVERY_ROW


def packs_weights(dtype: torch.dtype, instructions: Instructions) -> bool:
    """Whether weights of this dtype are better packed, if the kernels can be built.

    `NativeKernels.packs` says whether they can pack.
    """
    return dtype is torch.bfloat16 and is_x86() and not has_bf16_products(instructions)
