"""Benchmarks of VRAMancer against the engines its users could pick instead.

Start with ``python -m benchmarks.run --help``; ``benchmarks/README.md`` says what is measured and how.

With ``VRM_CPU_INSTRUCTIONS=avx2`` or ``avx512`` in the environment, torch and the libraries below it are held to the
instructions of processors before AVX-512, or before AMX, as well, whichever benchmark runs. They look at their
variables when they are loaded, so this comes before anything else.
"""

import os

from core.config import load_settings

HELD = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
}
os.environ |= HELD.get(load_settings().engine.cpu_instructions, {})
