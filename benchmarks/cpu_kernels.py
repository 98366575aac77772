"""The compiled CPU kernels beside torch, in one run: a machine's speed drifts, so read the ratios.

    python -m benchmarks.cpu_kernels [linear] [attention] [prefill] [calls]

Times are the best of several, taken in turn. Linear: all linear layers of a 437M-parameter Llama-shaped model, once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import gettempdir

import torch
import torch.nn.functional as F

from core.execution.native import NativeKernels, load_native
from core.execution.native.kernels import PreparedLinear

HIDDEN, INTERMEDIATE, KV, LAYERS, VOCABULARY = 1280, 4096, 320, 20, 32000
LAYER = [(HIDDEN, HIDDEN), (KV, HIDDEN), (KV, HIDDEN), (HIDDEN, HIDDEN)]
LAYER += [(INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)]
BLOCK = 16


def best_of(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The shortest time of each, in milliseconds; rounds alternate between them."""
    times = dict.fromkeys(contenders, float("inf"))
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            times[name] = min(times[name], (time.perf_counter() - start) * 1e3)
    return times


def show(title: str, times: dict[str, float], note: str = "") -> None:
    ours = times["ours"]
    others = "  ".join(f"{name} {ms:8.2f} ({ms / ours:.2f}x)" for name, ms in times.items() if name != "ours")
    print(f"{title:34} ours {ours:8.2f} ms  {others}  {note}", flush=True)


def read_bandwidth() -> float:
    """GB/s of torch summing a large fp32 buffer."""
    buffer = torch.ones(100_000_000)
    return buffer.nbytes / best_of({"sum": buffer.sum}, 8)["sum"] / 1e6


def stack(dtype: torch.dtype, layers: int) -> list[torch.Tensor]:
    shapes = LAYER * layers + [(VOCABULARY, HIDDEN)]
    return [torch.randn(shape).mul_(0.02).to(dtype) for shape in shapes]


def linear_case(kernels: NativeKernels, weights: Sequence[torch.Tensor], rows: int, scale: float, rounds: int) -> None:
    """One pass over the weights with `rows` rows; `scale` makes up for layers left out."""
    dtype = weights[0].dtype
    inputs = {k: torch.randn(rows, k).to(dtype) for k in (HIDDEN, INTERMEDIATE)}
    pairs = [(inputs[weight.shape[1]], weight) for weight in weights]
    prepared = [(x, PreparedLinear(kernels, weight, None)) for x, weight in pairs]
    contenders: dict[str, Callable[[], object]] = {
        "ours": lambda: [ours.run(x) for x, ours in prepared],
        "F.linear": lambda: [F.linear(x, w) for x, w in pairs],
    }
    if rows == 1:
        contenders["mv"] = lambda: [torch.mv(w, x[0]) for x, w in pairs]
    if dtype is not torch.float32 and rows >= 16:
        contenders["fp32 mm"] = lambda: [torch.mm(x.float(), w.float().t()).to(dtype) for x, w in pairs]
    times = {name: ms * scale for name, ms in best_of(contenders, rounds).items()}
    size = sum(w.nbytes for w in weights) * scale
    flops = 2 * rows * sum(w.numel() for w in weights) * scale
    note = f"{size / times['ours'] / 1e6:.1f} GB/s" if rows < 8 else f"{flops / times['ours'] / 1e6:.0f} GFLOP/s"
    show(f"linear {str(dtype)[6:]} M={rows}", times, note)


def linear(kernels: NativeKernels) -> None:
    print(f"read bandwidth {read_bandwidth():.1f} GB/s")
    for dtype in (torch.bfloat16, torch.float32):
        weights = stack(dtype, LAYERS)
        for rows in (1, 2, 4, 8, 16, 32, 64):
            linear_case(kernels, weights, rows, 1.0, 8 if rows < 16 else 3)
        sample = weights[: len(LAYER)]
        scale = sum(w.nbytes for w in weights) / sum(w.nbytes for w in sample)
        for rows in (128, 512, 2048):
            linear_case(kernels, sample, rows, scale, 3)
    print(f"read bandwidth {read_bandwidth():.1f} GB/s")


def pages(
    queries: Sequence[int], lengths: Sequence[int], heads: int, kv_heads: int, dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """bf16 queries, K and V pages, permuted block tables, query starts and lengths."""
    needed = [-(-length // BLOCK) for length in lengths]
    order = torch.randperm(sum(needed)).to(torch.int32)
    tables = torch.zeros(len(lengths), max(needed), dtype=torch.int32)
    taken = 0
    for row, count in enumerate(needed):
        tables[row, :count] = order[taken : taken + count]
        taken += count
    k, v = (torch.randn(sum(needed), BLOCK, kv_heads, dim).bfloat16() for _ in range(2))
    starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    return torch.randn(sum(queries), heads, dim).bfloat16(), k, v, tables, starts, torch.tensor(lengths).to(torch.int32)


def gather_sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tables: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """The way of torch: each sequence's pages in one piece, then scaled_dot_product_attention."""
    results = []
    for index, length in enumerate(lengths.tolist()):
        rows = q[starts[index] : starts[index + 1]].transpose(0, 1)[None]
        table = tables[index, : -(-length // BLOCK)].long()
        key, value = (p[table].flatten(0, 1)[:length].transpose(0, 1)[None] for p in (k, v))
        count = rows.shape[2]
        mask = None
        if count > 1:
            mask = torch.ones(count, length, dtype=torch.bool).tril(length - count)
        results.append(F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, enable_gqa=True)[0])
    return torch.cat([result.transpose(0, 1) for result in results])


def attention_case(kernels: NativeKernels, title: str, queries: list[int], lengths: list[int], dim: int) -> None:
    q, k, v, tables, starts, totals = pages(queries, lengths, 16, 4, dim)
    times = best_of(
        {
            "ours": lambda: kernels.paged_attention(q, k, v, tables, starts, totals, dim**-0.5),
            "gather+SDPA": lambda: gather_sdpa(q, k, v, tables, starts, totals),
        },
        10,
    )
    show(title, times, f"{(k.nbytes + v.nbytes) / times['ours'] / 1e6:.1f} GB/s of KV")


def attention(kernels: NativeKernels) -> None:
    for dim in (64, 128):
        for sequences, length in ((1, 160), (16, 160), (16, 2048), (1, 2048), (1, 32768)):
            title = f"decode S={sequences} context={length} D={dim}"
            attention_case(kernels, title, [1] * sequences, [length] * sequences, dim)


def prefill(kernels: NativeKernels) -> None:
    for dim in (64, 128):
        for earlier in (0, 1024, 4096):
            title = f"512-token chunk after {earlier} D={dim}"
            attention_case(kernels, title, [512], [512 + earlier], dim)


def calls(kernels: NativeKernels) -> None:
    """Small work: mostly the price of a call."""
    x, weight = torch.randn(1, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    prepared = PreparedLinear(kernels, weight, None)
    loops = range(2000)
    each: dict[str, Callable[[], object]] = {
        "ours": lambda: [prepared(x) for _ in loops],
        "F.linear": lambda: [F.linear(x, weight) for _ in loops],
    }
    show("2000 linears 64x64", best_of(each, 5), "(us a call: half the number)")

    def repeated(work: Callable[[], object]) -> None:
        for _ in loops:
            work()

    key, cache, slots = torch.randn(16, 4, 64).bfloat16(), torch.zeros(64, BLOCK, 4, 64).bfloat16(), torch.arange(16)
    flat = cache.view(-1, 4, 64)
    each = {
        "ours": lambda: repeated(lambda: kernels.write_kv(key, key, cache, cache, slots)),
        "index_copy_": lambda: repeated(lambda: (flat.index_copy_(0, slots, key), flat.index_copy_(0, slots, key))),
    }
    show("2000 KV writes, 16 tokens", best_of(each, 5))
    x, gain = torch.randn(16, HIDDEN).bfloat16(), torch.ones(HIDDEN).bfloat16()

    def by_torch() -> torch.Tensor:
        wide = x.float()
        return gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).bfloat16()

    each = {
        "ours": lambda: [kernels.rms_norm(x, gain, 1e-5) for _ in loops],
        "eager": lambda: [by_torch() for _ in loops],
    }
    show("2000 RMS norms of 16 rows", best_of(each, 3))


def main() -> None:
    parts = {"linear": linear, "attention": attention, "prefill": prefill, "calls": calls}
    kernels = load_native(Path(gettempdir()) / "vramancer-kernels")
    if kernels is None:
        sys.exit("The kernels could not be built.")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    with torch.inference_mode():
        for name in sys.argv[1:] or parts:
            parts[name](kernels)


if __name__ == "__main__":
    main()
