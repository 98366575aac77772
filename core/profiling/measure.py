"""Short real runs on one device: how long something takes, and how fast it reads weights and multiplies matrices.

Everything runs in the code that serves: linear layers as `select_attention` adapts them for the device. Weights are
random.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from core.devices import Device, format_bytes
from core.errors import OutOfDeviceMemoryError

Adapter = Callable[[nn.Module], None]

_MIB = 1024 * 1024
_SHORTEST_SAMPLE_S = 1e-3
_WARM_UP_SHARE, _MOST_WARM_UP_S = 0.1, 0.1
_ENOUGH_SAMPLES = 6
_AGREEMENT = 1.02
_SAMPLES_PER_BUDGET = 6
_MOST_MLPS = 128
_MOST_COLD_BYTES = 1024 * _MIB
_CPU_CACHES = Path("/sys/devices/system/cpu")


# -- time -----------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def time_once(work: Callable[[], object], device: torch.device) -> float:
    """Seconds from the start of `work` on an idle `device` to the end of its last operation there."""
    synchronize(device)
    if device.type == "cuda":
        make_event: Any = torch.cuda.Event
        start, end = make_event(enable_timing=True), make_event(enable_timing=True)
        stream = torch.cuda.current_stream(device)
        start.record(stream)
        work()
        end.record(stream)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    started_s = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started_s


def time_runs(work: Callable[[], object], device: torch.device, budget_s: float) -> float:
    """Seconds that `work` takes on `device`: the median of its runs, which is what serving will get of it.

    Runs that are shorter than a millisecond are timed several at a time, so that a GPU's queue stays full. It ends
    after `budget_s` seconds (warm-up not counted), or earlier once the middle half agree within 2 %.
    """
    work()  # compiles, fills caches and allocators
    warm_s = time.perf_counter() + min(_WARM_UP_SHARE * budget_s, _MOST_WARM_UP_S)
    once_s = time_once(work, device)
    while time.perf_counter() < warm_s:  # clocks rise under load
        once_s = time_once(work, device)
    repeats = max(1, min(1000, math.ceil(_SHORTEST_SAMPLE_S / max(once_s, 1e-9))))
    samples: list[float] = []
    started_s = time.perf_counter()
    while True:
        samples.append(time_once(lambda: [work() for _ in range(repeats)], device) / repeats)
        middle = sorted(samples)[len(samples) // 4 : len(samples) - len(samples) // 4]
        agreed = len(samples) >= _ENOUGH_SAMPLES and middle[-1] <= _AGREEMENT * middle[0]
        if agreed or time.perf_counter() - started_s >= budget_s:
            return max(median(samples), 1e-9)


@contextmanager
def computing_as_served(device: Device, torch_threads: int) -> Iterator[None]:
    """The device is current and torch has as many threads as in the engine; afterwards its memory is given back."""
    at: Any = torch.cuda.device(device.torch_device) if device.is_gpu else nullcontext()
    threads = torch.get_num_threads()
    torch.set_num_threads(torch_threads)
    try:
        with at:
            yield
    finally:
        torch.set_num_threads(threads)
        if device.is_gpu:
            torch.cuda.empty_cache()
        elif device.is_mps:
            torch.mps.empty_cache()


# -- memory ---------------------------------------------------------------------------------------------------------


def cold_bytes(device: Device) -> int:
    """How many bytes have to be read in turn so that none of them is still in a cache of `device`."""
    if device.computes_on_cpu:
        return min(max(4 * _cpu_cache_bytes(), 64 * _MIB), _MOST_COLD_BYTES)
    cache = 0
    if device.is_gpu:
        cache = int(getattr(torch.cuda.get_device_properties(device.torch_device), "L2_cache_size", 0))
    return min(max(4 * cache, 512 * _MIB), _MOST_COLD_BYTES)  # AMD's and Apple's outer caches are not reported


def _cpu_cache_bytes() -> int:
    """The last-level caches of all cores together; 0 where the system does not tell."""
    sizes: dict[tuple[int, str], int] = {}
    try:
        for folder in _CPU_CACHES.glob("cpu[0-9]*/cache/index[0-9]*"):
            level, text = int((folder / "level").read_text()), (folder / "size").read_text().strip()
            unit = {"K": 1024, "M": _MIB}.get(text[-1:], 1)
            sizes[level, (folder / "shared_cpu_list").read_text().strip()] = int(text.rstrip("KM")) * unit
    except (OSError, ValueError):
        return 0
    last = max((level for level, _ in sizes), default=0)
    return sum(size for (level, _), size in sizes.items() if level == last)


def fill(tensor: torch.Tensor, tile: torch.Tensor) -> torch.Tensor:
    """Copy `tile` into `tensor`, over and over, and return the tensor.

    Real numbers in real pages: fresh zero pages are all one page of memory.
    """
    flat, step = tensor.view(-1), tile.numel()
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        part.copy_(tile[: part.numel()])
    return tensor


def random_tile(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The same random numbers every time, as large as weights are."""
    return torch.randn(_MIB, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(device, dtype)


# -- matrix products ------------------------------------------------------------------------------------------------


Rate = Callable[[float], float]
"""Measures for about so many seconds, and returns how much is done in one."""


class Products:
    """Weights in one buffer that is larger than the device's caches, read in turn by linear layers and gated MLPs."""

    def __init__(
        self, device: Device, dtype: torch.dtype, hidden: int, inner: int, room_bytes: int, adapt: Adapter
    ) -> None:
        self._device = torch.device(device.torch_device)
        self._dtype, self._hidden, self._adapter = dtype, hidden, adapt
        self.nbytes = nbytes = min(room_bytes, max(cold_bytes(device), 3 * hidden * inner * dtype.itemsize))
        self._inner = min(inner, nbytes // (3 * hidden * dtype.itemsize))
        if self._inner == 0:
            raise OutOfDeviceMemoryError(
                f"{device.name}: {format_bytes(room_bytes)} of memory are too little to measure its speed in."
            )
        # Calls cost something too: reading is measured on matrices so large that it does not matter.
        self._large = (16 if self._device.type == "cpu" else 64) * _MIB
        self._tile = random_tile(dtype, self._device)
        self._buffer = torch.empty(nbytes // dtype.itemsize, dtype=dtype, device=self._device)
        self._mlps: dict[int, list[nn.Module]] = {}

    def reading(self) -> Rate:
        """In bytes: linear layers that read their weights for one row."""
        most = self._buffer.numel() // self._hidden
        width = min(most, max(self._inner, self._large // (self._hidden * self._dtype.itemsize)))
        shape = (width, self._hidden)
        linears = nn.ModuleList(self._linear(shape, index) for index in range(most // width))
        self._adapt(linears)
        x, nbytes = self._input(1), len(linears) * width * self._hidden * self._dtype.itemsize
        return self._rate(lambda: [linear(x) for linear in linears], nbytes)

    def computing(self, rows: int, expected: float, budget_s: float) -> Rate:
        """In floating-point operations: gated MLPs of the model's size, for `rows` rows.

        An MLP that would use the budget up at the `expected` rate is made narrower.
        """
        sample_flops = expected * budget_s / _SAMPLES_PER_BUDGET
        narrow = max(256, int(sample_flops / (6 * rows * self._hidden)) // 64 * 64)
        inner = min(self._inner, narrow)
        if inner not in self._mlps:
            self._mlps[inner] = self._gated_mlps(inner)
        mlp_flops = 6 * rows * inner * self._hidden
        count = max(1, min(len(self._mlps[inner]), int(sample_flops / mlp_flops)))
        x, turn = self._input(rows), itertools.cycle(self._mlps[inner])

        def work() -> None:
            for mlp in itertools.islice(turn, count):
                mlp(x)

        return self._rate(work, count * mlp_flops)

    def _rate(self, work: Callable[[], object], amount: float) -> Rate:
        """`amount` is what one run does."""
        return lambda budget_s: amount / time_runs(work, self._device, budget_s)

    def _input(self, rows: int) -> torch.Tensor:
        empty = torch.empty(1, rows, self._hidden, dtype=self._dtype, device=self._device)
        return fill(empty, self._tile)

    def _gated_mlps(self, inner: int) -> list[nn.Module]:
        """As many as there are weights for. Llama's module: the kernels know it, and most models have one like it."""
        config = LlamaConfig(hidden_size=self._hidden, intermediate_size=inner, hidden_act="silu", mlp_bias=False)
        mlps = nn.ModuleList()
        for index in range(min(self._buffer.numel() // (3 * inner * self._hidden), _MOST_MLPS)):
            with torch.device("meta"):
                mlp = LlamaMLP(config)
            mlp.gate_proj = self._linear((inner, self._hidden), 3 * index)
            mlp.up_proj = self._linear((inner, self._hidden), 3 * index + 1)
            mlp.down_proj = self._linear((self._hidden, inner), 3 * index + 2)
            mlps.append(mlp)
        self._adapt(mlps)
        return list(mlps)

    def _adapt(self, modules: nn.ModuleList) -> None:
        """Weights that were packed before are no numbers any more. Packed modules from before then compute others, in
        the same time."""
        fill(self._buffer, self._tile)
        self._adapter(modules)

    def _linear(self, shape: tuple[int, int], index: int) -> nn.Linear:
        """A linear layer, `(out, in)`, whose weight is number `index` of those of its size in the buffer."""
        size = shape[0] * shape[1]
        linear = nn.Linear(shape[1], shape[0], bias=False, device="meta")
        weight = self._buffer[index * size : (index + 1) * size].view(shape)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        return linear
