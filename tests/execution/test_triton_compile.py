"""The largest tile of each head size and dtype compiles ahead of time, and takes no more shared memory than was allowed
for, nor than the card has. All variants and targets: `scripts/compile_kernels.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from scripts.compile_kernels import HEAD_DIMS, compile_variant, wanted

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SERVED = [dims for dims in HEAD_DIMS if max(dims) <= 256]
SPILLED_AT_MOST = 128
"""Bytes per thread: what does not stay in registers beside the rest, not a tile that does not fit into them."""


@pytest.mark.parametrize(
    ("target", "dtype"),
    [("sm_75", FP16), ("sm_75", FP32), ("sm_86", BF16), ("sm_86", FP16), ("sm_86", FP32), ("gfx942", BF16),
     ("gfx942", FP16), ("gfx942", FP32)],
)  # fmt: skip
def test_largest_tiles(target: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # compiled from nothing
    largest = [
        (variant, is_prefill, where)
        for variant, is_prefill, where in wanted([target], [dtype], SERVED, largest=True)
        if is_prefill and not variant.is_partial
    ]
    assert [(v.kind.heads.key_dim, v.kind.heads.value_dim) for v, _, _ in largest] == SERVED
    for each in largest:
        compiled = compile_variant(*each)
        assert 0 < compiled.shared <= compiled.allowed <= compiled.limit, compiled
        assert compiled.registers > 0 and compiled.spills <= SPILLED_AT_MOST, compiled


def test_what_bf16_cannot_be_compiled_for_is_not_asked_for() -> None:
    assert not list(wanted(["sm_75"], [BF16], SERVED)) and list(wanted(["sm_80"], [BF16], SERVED))


def test_reads_are_of_sixteen_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No argument is specialized, so that alignment has to come from the constants."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    reads = {}
    for dim in (128, 20):
        variant, is_prefill, target = next(iter(wanted(["sm_75"], [FP16], [(dim, dim)])))
        reads[dim] = compile_variant(variant, is_prefill, target).assembly.count("ld.global.v4.b32")
    assert reads[128] > 0 and reads[20] == 0
