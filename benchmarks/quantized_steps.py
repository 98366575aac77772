"""Linear layers of a step from quantized weights beside whole steps of llama.cpp, by the CPU time of one thread.

    python -m benchmarks.quantized_steps --rows 1,16 --rounds 9

For a machine on which others work: what a thread waits for a processor is not counted (what it waits for memory is),
and all take turns. Ours are linear layers alone, those of a few layers scaled to the model; llama.cpp's are whole steps
without a context before them, so that what is beside products is in theirs and not in ours.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.machine import machine_info
from benchmarks.models import SHAPES, default_workdir, resolve_model
from benchmarks.peers.llama_cpp import LlamaCppPeer, LlamaCppQ40Peer, LlamaCppQ80Peer
from benchmarks.run import positives
from core.execution.attention.select import LinearAdapter
from core.execution.native import load_native
from core.quantization.form import WeightForm
from core.quantization.linear import QuantLinear

FORMS = {
    "int8": WeightForm(8, 128, offset=128),
    "int4": WeightForm(4, 64, zero="float16"),
    "Q8_0": WeightForm(8, 32, offset=128),
    "Q4_0": WeightForm(4, 32, offset=8),
    "Q4_K": WeightForm(4, 32, scale="uint8", minimum="uint8", supers="float16"),
    "Q6_K": WeightForm(6, 16, scale="int8", offset=32, supers="float16"),
}
PEERS = (LlamaCppPeer, LlamaCppQ80Peer, LlamaCppQ40Peer)
LAYERS = 6
"""Enough that their weights are in no cache."""

Step = Callable[[], object]


def shapes() -> list[tuple[int, int]]:
    """`[n, k]` of the linear layers of a decoder layer of the 443M model."""
    shape = SHAPES["443m"]
    width, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = [(width, shape.hidden), (narrow, shape.hidden), (narrow, shape.hidden), (shape.hidden, width)]
    return attention + [(shape.intermediate, shape.hidden)] * 2 + [(shape.hidden, shape.intermediate)]


def scale() -> float:
    """How many times as many weights the model's linear layers have, its head included."""
    shape = SHAPES["443m"]
    layer = sum(n * k for n, k in shapes())
    return (layer * shape.layers + shape.vocab * shape.hidden) / (layer * LAYERS)


def random_layer(form: WeightForm | None, n: int, k: int) -> nn.Module:
    """A linear layer of any numbers: in bf16, or in a form."""
    if form is None:
        return nn.Linear(k, n, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layer = QuantLinear(form, k, n, dtype=torch.bfloat16)
    for buffer in layer.buffers():
        if buffer.dtype.is_floating_point:
            buffer.uniform_(0.005, 0.02)
        else:
            buffer.random_(0, 128)
    return layer


def our_steps(rows: int, adapter: LinearAdapter) -> dict[str, Step]:
    """The linear layers of a step, one after another, for each form."""
    inputs = {k: torch.randn(rows, k).bfloat16() for _, k in shapes()}
    steps: dict[str, Step] = {}
    for name, form in {"bf16": None, **FORMS}.items():
        model = nn.ModuleList(random_layer(form, n, k) for _ in range(LAYERS) for n, k in shapes())
        adapter(model)
        steps[name] = lambda model=model: [layer(inputs[layer.in_features]) for layer in model]  # type: ignore[misc]
    return steps


def their_steps(rows: int, model_dir: Path) -> dict[str, Step]:
    """Steps of llama.cpp that decode a token of each of `rows` sequences."""
    steps: dict[str, Step] = {}
    for kind in PEERS:
        peer = kind()
        peer.load(model_dir, 1, rows, 64)
        records = [(100 + sequence, 0, sequence, True) for sequence in range(rows)]

        def step(peer: LlamaCppPeer = peer, records: list[tuple[int, int, int, bool]] = records) -> None:
            peer.forget()
            peer.decode(records)

        steps[f"llama.cpp {peer.dtype}"] = step
    return steps


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=positives, default="1,16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workdir", type=Path, default=default_workdir())
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kernels = load_native(arguments.workdir / "kernels", 1)
    if kernels is None:
        sys.exit("The kernels could not be built.")
    model_dir = resolve_model("443m", arguments.workdir)
    print(machine_info()["cpu"])
    for rows in arguments.rows:
        with torch.inference_mode():
            ours = our_steps(rows, LinearAdapter(kernels))
            steps = {**ours, **their_steps(rows, model_dir)}
            times: dict[str, list[float]] = {name: [] for name in steps}
            for _ in range(arguments.rounds):
                for name, step in steps.items():
                    step()  # caches are the others'
                    start = time.thread_time()
                    step()
                    times[name].append((time.thread_time() - start) * 1e3 * (scale() if name in ours else 1.0))
        for name, found in times.items():
            ratio = statistics.median(a / b for a, b in zip(times["bf16"], found, strict=True))
            print(f"{rows:3} rows  {name:18} {statistics.median(found):7.1f} ms  {ratio:.2f} x bf16")


if __name__ == "__main__":
    main()
