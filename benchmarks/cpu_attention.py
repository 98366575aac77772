"""Ways to attend over paged KV on the CPU, in one run: the native kernel, SDPA three ways, FlexAttention.

    python -m benchmarks.cpu_attention [--threads 2] [--repeats 20]

Decode: one query per sequence. Prefill: a chunk of queries behind earlier tokens. bf16, 16 query and 4 KV heads of 64.
Every way gets the same pages; gathering them is part of its time. Medians in microseconds, and the ratio to native.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from core.execution.attention.metadata import AttentionMetadata, AttentionSpec
from core.execution.attention.native_paged import NativePagedAttention
from core.execution.attention.torch_paged import TorchPagedAttention
from core.execution.native import load_native

HEADS, KV_HEADS, DIM, BLOCK = 16, 4, 64, 16
CASES = {
    "decode 1 x 160": [(1, 160)],
    "decode 16 x 160": [(1, 160)] * 16,
    "decode 16 x 2048": [(1, 2048)] * 16,
    "decode 16 x 100..2000": [(1, 100 + 127 * index) for index in range(16)],
    "prefill 256 of 256": [(256, 256)],
    "prefill 256 of 2048": [(256, 2048)],
}
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionMetadata, AttentionSpec]
Way = Callable[[Inputs], torch.Tensor]


def make(sequences: list[tuple[int, int]]) -> Inputs:
    """Random pages in random order."""
    needed = [-(-length // BLOCK) for _, length in sequences]
    order = torch.randperm(sum(needed)).int()
    tables, taken = torch.zeros(len(needed), max(needed), dtype=torch.int32), 0
    for row, count in enumerate(needed):
        tables[row, :count] = order[taken : taken + count]
        taken += count
    starts = torch.tensor([0, *(rows for rows, _ in sequences)]).cumsum(0).int()
    lengths = torch.tensor([length for _, length in sequences]).int()
    metadata = AttentionMetadata(
        torch.zeros(0, dtype=torch.int64), tables, starts, lengths, sum(rows == 1 for rows, _ in sequences),
        tuple(starts.tolist()), tuple(lengths.tolist()), max(rows for rows, _ in sequences),
    )  # fmt: skip
    pages = [torch.randn(sum(needed), BLOCK, KV_HEADS, DIM).bfloat16() for _ in range(2)]
    query = torch.randn(int(starts[-1]), HEADS, DIM).bfloat16()
    return query, pages[0], pages[1], metadata, AttentionSpec(DIM**-0.5)


def per_sequence(inputs: Inputs) -> torch.Tensor:
    """Each sequence's pages gathered by themselves, SDPA on each."""
    query, k_pages, v_pages, meta, spec = inputs
    out = torch.empty_like(query)
    for index, length in enumerate(meta.host_seq_lens):
        rows = slice(meta.host_query_start[index], meta.host_query_start[index + 1])
        count = rows.stop - rows.start
        table = meta.block_tables[index, : -(-length // BLOCK)].long()
        key, value = (p[table].flatten(0, 1)[:length].transpose(0, 1)[None] for p in (k_pages, v_pages))
        mask = None if count == 1 else torch.ones(count, length, dtype=torch.bool).tril(length - count)
        q = query[rows].transpose(0, 1)[None]
        out[rows] = F.scaled_dot_product_attention(q, key, value, attn_mask=mask, scale=spec.scale, enable_gqa=True)[
            0
        ].transpose(0, 1)
    return out


def flex() -> Way:
    """FlexAttention, compiled, over pages gathered to the longest sequence."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=True)

    def run(inputs: Inputs) -> torch.Tensor:
        query, k_pages, v_pages, meta, spec = inputs
        count, longest = len(meta.host_seq_lens), max(meta.host_seq_lens)
        rows = query.shape[0] // count
        tables = meta.block_tables.long()
        key, value = (p[tables].flatten(1, 2)[:, :longest].transpose(1, 2).contiguous() for p in (k_pages, v_pages))
        lengths = meta.seq_lens.long()
        mask = create_block_mask(
            lambda b, h, q, kv: kv <= lengths[b] - rows + q, count, None, rows, longest, device="cpu"
        )
        q = query.view(count, rows, HEADS, DIM).transpose(1, 2).contiguous()
        out = compiled(q, key, value, block_mask=mask, scale=spec.scale, enable_gqa=True)
        return out.transpose(1, 2).reshape(query.shape)

    return run


def measure(way: Way, inputs: Inputs, repeats: int) -> float:
    """Median seconds of a call, after two that warm up."""
    times = []
    for index in range(repeats + 2):
        started = time.perf_counter()
        way(inputs)
        if index > 1:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of every way")
    parser.add_argument("--repeats", type=int, default=20, help="calls that count")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    kernels = load_native(Path(tempfile.gettempdir()) / "vramancer-bench-kernels")
    if kernels is None:
        raise SystemExit("the native kernels cannot be built here")
    native, plain = NativePagedAttention(kernels), TorchPagedAttention()
    ways: dict[str, Way] = {
        "native": lambda inputs: native.attend(*inputs),
        "SDPA, padded batch": lambda inputs: plain.attend(*inputs),
        "SDPA per sequence": per_sequence,
        "FlexAttention": flex(),
    }
    table = Table("case", *ways)
    with torch.inference_mode():
        for name, sequences in CASES.items():
            inputs, cells, base = make(sequences), [], 0.0
            expected = native.attend(*inputs).float()
            for way in ways.values():
                try:
                    error = (way(inputs).float() - expected).abs().max().item()
                    seconds = measure(way, inputs, arguments.repeats)
                except (RuntimeError, ValueError, NotImplementedError) as refusal:
                    cells.append(f"no: {type(refusal).__name__}")
                    continue
                base = base or seconds
                cells.append(f"{seconds * 1e6:.0f} ({seconds / base:.1f}x)" + ("" if error < 0.05 else " WRONG"))
            table.add_row(name, *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    with torch.inference_mode(), torch.no_grad():
        main()
