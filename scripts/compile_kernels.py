#!/usr/bin/env python3
"""Compile the attention kernel ahead of time, for cards that need not be there, and print what each variant takes.

    python scripts/compile_kernels.py --workers 2 --markdown benchmarks/results/attention-kernels.md

Triton brings its own assembler for NVIDIA's cards and code generator for AMD's. Of each variant: shared memory beside
what `core.execution.attention.triton_variants` allows for, and registers and spilled bytes of a thread. Fails if one
takes more than was allowed for or than the card has. On two cores all of it takes about an hour; `--targets`,
`--dtypes`, `--heads` and `--largest` choose a part.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.errors import UnsupportedModelError
from core.execution.attention import triton_paged
from core.execution.attention.triton_variants import AttentionKind, GpuLimits, Heads, Variant, shared_bytes, variants_of
from core.models.architecture import DTYPES

KIB = 1024
TARGETS: dict[str, tuple[GPUTarget, GpuLimits]] = {
    **{
        f"sm_{arch}": (GPUTarget("cuda", arch, 32), GpuLimits("cuda", arch, kib * KIB))
        for arch, kib in ((75, 64), (80, 163), (86, 99), (89, 99), (90, 227), (120, 99))
    },
    **{
        arch: (GPUTarget("hip", arch, threads), GpuLimits("hip", 0, 64 * KIB, threads))
        for arch, threads in (("gfx90a", 64), ("gfx942", 64), ("gfx1100", 32))
    },
}
"""With the shared memory that one block of threads may have: CUDA C++ Programming Guide, "Technical Specifications per
Compute Capability"; 64 KiB of local data share on all of AMD's."""

HEAD_DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128), (512, 512), (576, 512))
"""Of keys and of values. The pairs are those of multi-head latent attention, expanded and not."""

_TRITON_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Compiled:
    """What one variant takes on one target. `spills` are bytes per thread."""

    target: str
    variant: Variant
    is_prefill: bool
    shared: int
    allowed: int
    limit: int
    registers: int
    spills: int
    seconds: float
    assembly: str


def kinds_of(heads: Heads, block_size: int = 16) -> list[AttentionKind]:
    """Nothing beside causality, and everything at one time."""
    return [
        AttentionKind(heads, block_size, has_window=False, has_softcap=False, sinks=None),
        AttentionKind(heads, block_size, has_window=True, has_softcap=True, sinks=heads.dtype),
    ]


def compile_variant(variant: Variant, is_prefill: bool, target_name: str) -> Compiled:
    """Compile one variant, by the signature that `TritonPagedAttention` launches it with."""
    target, limits = TARGETS[target_name]
    own = _TRITON_TYPES[variant.kind.heads.dtype]
    types = {
        **dict.fromkeys(("query", "k_pages", "v_pages"), f"*{own}"),
        **dict.fromkeys(("tables", "query_start", "seq_lens"), "*i32"),
        **dict.fromkeys(("row_lo", "row_hi"), "*i32" if variant.is_partial else None),
        **dict.fromkeys(("scale", "softcap"), "fp32"),
        **dict.fromkeys(("window", "table_row"), "i32"),
        "out": "*fp32" if variant.is_partial else f"*{own}",
        "lse": "*fp32" if variant.is_partial else None,
        "sinks": None if variant.kind.sinks is None else f"*{_TRITON_TYPES[variant.kind.sinks]}",
    }
    constants: dict[str, int | bool | None] = {name: None for name, given in types.items() if given is None}
    constants |= triton_paged.constants(variant)
    kernel = triton_paged._paged_attention
    signature = {name: types.get(name) or "constexpr" for name in kernel.arg_names}
    started_s, log = time.perf_counter(), io.StringIO()
    knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(log):
        kernel = triton.compile(
            ASTSource(kernel, signature, constants), target=target, options=triton_paged.options(variant)
        )
    assembly = kernel.asm["amdgcn" if target.backend == "hip" else "ptx"]
    registers, spills = _amd_usage(assembly) if target.backend == "hip" else _nvidia_usage(log.getvalue())
    return Compiled(
        target_name, variant, is_prefill, kernel.metadata.shared,
        shared_bytes(variant.kind.heads, variant.tile, limits), limits.shared_bytes, registers, spills,
        time.perf_counter() - started_s, assembly,
    )  # fmt: skip


def _nvidia_usage(log: str) -> tuple[int, int]:
    """Registers, and bytes that are spilled, from what `ptxas -v` says."""
    registers, spills = re.search(r"Used (\d+) registers", log), re.search(r"(\d+) bytes spill stores", log)
    if registers is None or spills is None:
        raise ValueError(f"ptxas does not say what the kernel takes (or it came from a cache): {log[:300]!r}")
    return int(registers[1]), int(spills[1])


def _amd_usage(assembly: str) -> tuple[int, int]:
    found = [re.search(rf"\.{name}:\s+(\d+)", assembly) for name in ("vgpr_count", "vgpr_spill_count")]
    registers, spilled = (int(match[1]) if match is not None else 0 for match in found)
    return registers, 4 * spilled


def wanted(
    targets: Iterable[str], dtypes: Iterable[torch.dtype], dims: Iterable[tuple[int, int]], *, largest: bool = False
) -> Iterator[tuple[Variant, bool, str]]:
    """Variant, whether it is for prefill, and target. bf16 is not for cards before 8.0; heads that fit no tile are left
    out, as the backend refuses them. `largest` leaves out those without window, soft cap and sinks."""
    for target, dtype, (key_dim, value_dim) in itertools.product(targets, dtypes, dims):
        limits = TARGETS[target][1]
        if dtype is torch.bfloat16 and limits.backend == "cuda" and limits.capability < 80:
            continue
        kinds = kinds_of(Heads(8, 4, key_dim, value_dim, dtype))[1 if largest else 0 :]
        for partial in (False, True):
            try:
                found = variants_of(kinds, limits, partial=partial)
            except UnsupportedModelError as error:
                print(f"{target}: {error}", file=sys.stderr)
                break
            yield from ((variant, is_prefill, target) for variant, (_, is_prefill) in found.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--heads", default=",".join(f"{key}/{value}" for key, value in HEAD_DIMS))
    parser.add_argument("--largest", action="store_true", help="leave out variants without window, soft cap and sinks")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--markdown", type=Path, help="write the table here")
    arguments = parser.parse_args()
    dims = [(int(key), int(value)) for key, value in (text.split("/") for text in arguments.heads.split(","))]
    dtypes = [DTYPES[name] for name in arguments.dtypes.split(",")]
    tasks = list(wanted(arguments.targets.split(","), dtypes, dims, largest=arguments.largest))
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(arguments.workers) as pool:
            done = []
            for each in pool.map(compile_variant, *zip(*tasks, strict=True)):
                done.append(each)
                print(f"{len(done)}/{len(tasks)} {row(each)} {each.seconds:.1f} s", flush=True)
    if arguments.markdown is not None:
        arguments.markdown.write_text(report(done, sys.argv[1:]), encoding="utf-8")
    wrong = [each for each in done if not each.shared <= each.allowed <= each.limit]
    for each in wrong:
        print(f"takes more shared memory than was allowed for: {row(each)}", file=sys.stderr)
    return 1 if wrong else 0


def row(each: Compiled) -> str:
    heads, tile = each.variant.kind.heads, each.variant.tile
    extras = ["softcap"] if each.variant.kind.has_softcap else []
    extras += ["window"] if each.variant.kind.has_window else []
    extras += ["sinks"] if each.variant.kind.sinks is not None else []
    what = ("prefill" if each.is_prefill else "decode") + (", partial" if each.variant.is_partial else "")
    cells = (
        each.target, str(heads.dtype).removeprefix("torch."), f"{heads.key_dim}/{heads.value_dim}", what,
        ", ".join(extras), f"{tile.rows} x {tile.keys}, {tile.stages}, {tile.warps}", each.shared, each.allowed,
        each.registers, each.spills,
    )  # fmt: skip
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def report(done: list[Compiled], arguments: list[str]) -> str:
    """The table, with its versions and command."""
    lines = [
        "# Attention kernels, compiled ahead of time",
        "",
        f"Triton {triton.__version__}, torch {torch.__version__}, Python {platform.python_version()}, and no card.",
        "Figures: the compilers'. Four query heads to each of eight KV heads, pages of 16 tokens. Tile: rows x keys,",
        "pipeline stages, warps. Bytes: shared memory of a block, what was allowed for it, what a thread spills.",
        "A kernel that serves decodes and prompts alike is listed as one for prefill.",
        "",
        "```sh",
        " ".join(["python scripts/compile_kernels.py", *arguments]),
        "```",
        "",
        "| target | dtype | keys/values | for | with | tile | shared | allowed for | registers | spilled |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(row(each) for each in done), ""])


if __name__ == "__main__":
    raise SystemExit(main())
