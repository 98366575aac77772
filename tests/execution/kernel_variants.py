"""The native kernels as they are built for other processors, on whichever has the instructions.

Production builds for the processor that it runs on and there chooses what is fastest. Both are left out here: a
variant is built with flags of its own, and tests call its kernels whether they would be chosen here or not.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from plain_settings import CACHE_DIR
from torch import nn

from core.execution.native import NativeKernels, NativeLinear
from core.execution.native.build import build_library
from core.execution.native.instructions import Instructions, compiler_flags

_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Variant:
    """Compiler flags (None: those of production) and what `/proc/cpuinfo` has to say where the code can run."""

    flags: tuple[str, ...] | None = None
    needs: frozenset[str] = frozenset()
    instructions: Instructions = "native"


_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_AVX2_NAMES = frozenset({"avx2", "fma", "f16c", "bmi2"})
_AVX512_NAMES = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})
VARIANTS = {
    "this processor": Variant(),
    "any processor": Variant(()),
    "avx2": Variant(None, _AVX2_NAMES, "avx2"),
    "avx512": Variant(_AVX2 + _AVX512, _AVX2_NAMES | _AVX512_NAMES),
    "avx512 bf16": Variant(None, _AVX2_NAMES | _AVX512_NAMES | {"avx512_bf16"}, "avx512"),
}


@functools.cache
def _instructions() -> frozenset[str]:
    text = _INFO.read_text(errors="replace") if _INFO.exists() else ""
    return frozenset(word for line in text.splitlines() if line.startswith("flags") for word in line.split())


def load_variant(name: str) -> NativeKernels:
    """The kernels of a variant; skips where the processor lacks its instructions, or no compiler builds it."""
    variant = VARIANTS[name]
    lacking = variant.needs - _instructions()
    if lacking:
        pytest.skip(f"this processor lacks {', '.join(sorted(lacking))}")
    flags = compiler_flags(variant.instructions) if variant.flags is None else [variant.flags]
    path = build_library(CACHE_DIR / "kernels", flags)
    if path is None:
        pytest.skip("no C compiler that builds this")
    return NativeKernels(path, instructions=variant.instructions)


@torch.inference_mode()
def linear(
    kernels: NativeKernels, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """What a module that the kernels were given makes of these tensors."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=False)
    result: torch.Tensor = NativeLinear(module, kernels)(x)
    return result
