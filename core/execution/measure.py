"""Short real runs on one device: how fast it reads weights, multiplies matrices and gets through a decoder layer.

Everything runs in the code that serves: linear layers as `select_attention` adapts them for the device, and whole
decoder layers of the model's own architecture, bound to pages as a stage binds them. Weights are random.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.utils import logging as transformers_logging

from core.devices import Device, DeviceBudget, format_bytes
from core.errors import OutOfDeviceMemoryError
from core.execution.attention.interface import (
    ATTENTION_NAME,
    AttentionBackend,
    AttentionContext,
    LayerAttention,
    bind,
)
from core.execution.attention.metadata import AttentionMetadata
from core.kv_cache.paged_kv_cache import PagedKVCache
from core.models.architecture import Architecture
from core.models.stage_model import PassThrough, StageSlice, find_decoder, measure_bytes, stage_class

Adapter = Callable[[nn.Module], None]

_MIB = 1024 * 1024
_SHORTEST_SAMPLE_S = 1e-3
_WARM_UP_SHARE, _MOST_WARM_UP_S = 0.1, 0.1
_ENOUGH_SAMPLES = 6
_AGREEMENT = 1.02
_SAMPLES_PER_BUDGET = 6
_MOST_MLPS = 128
_MOST_LAYERS = 8
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
    """Seconds that `work` takes on `device`: the median of the fastest half of its runs.

    Whatever else the machine does only ever makes a run longer, so the fast runs are the nearest to what the device can
    do; the fastest alone would be the luckiest one, and would go on falling with every run added.

    Runs that are shorter than a millisecond are timed several at a time, so that a GPU's queue stays full. It ends
    after `budget_s` seconds (warm-up not counted), or earlier once the fastest half agree within 2 %.
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
        fast = sorted(samples)[: (len(samples) + 1) // 2]
        agreed = len(samples) >= _ENOUGH_SAMPLES and fast[-1] <= _AGREEMENT * fast[0]
        if agreed or time.perf_counter() - started_s >= budget_s:
            return max(median(fast), 1e-9)


# -- memory ---------------------------------------------------------------------------------------------------------


def cold_bytes(device: Device) -> int:
    """How many bytes have to be read in turn so that none of them is still in a cache of `device`."""
    if device.kind in ("cpu", "sim"):
        return min(max(4 * _cpu_cache_bytes(), 64 * _MIB), _MOST_COLD_BYTES)
    cache = 0
    if device.kind in ("cuda", "rocm"):
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


def _fill(tensor: torch.Tensor, tile: torch.Tensor) -> torch.Tensor:
    """Copy `tile` over and over. Real numbers in real pages: fresh zero pages are all one page of memory."""
    flat, step = tensor.view(-1), tile.numel()
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        part.copy_(tile[: part.numel()])
    return tensor


def _random_tile(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(_MIB, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(device, dtype)


# -- matrix products ------------------------------------------------------------------------------------------------


class Products:
    """Weights in one buffer that is larger than the device's caches, read in turn by linear layers and gated MLPs."""

    def __init__(
        self, device: Device, dtype: torch.dtype, hidden: int, inner: int, room_bytes: int, adapt: Adapter
    ) -> None:
        self._device = torch.device(device.torch_device)
        self._dtype, self._hidden, self._adapter = dtype, hidden, adapt
        nbytes = min(room_bytes, max(cold_bytes(device), 3 * hidden * inner * dtype.itemsize))
        self._inner = min(inner, nbytes // (3 * hidden * dtype.itemsize))
        if self._inner == 0:
            raise OutOfDeviceMemoryError(
                f"{device.name}: {format_bytes(room_bytes)} of memory are too little to measure its speed in."
            )
        # Calls cost something too: reading is measured on matrices so large that it does not matter.
        self._large = (16 if self._device.type == "cpu" else 64) * _MIB
        self._tile = _random_tile(dtype, self._device)
        self._buffer = torch.empty(nbytes // dtype.itemsize, dtype=dtype, device=self._device)
        self._mlps: dict[int, list[nn.Module]] = {}

    def bandwidth_bytes_s(self, budget_s: float) -> float:
        """Bytes per second at which linear layers read their weights for one row."""
        most = self._buffer.numel() // self._hidden
        width = min(most, max(self._inner, self._large // (self._hidden * self._dtype.itemsize)))
        shape = (width, self._hidden)
        linears = nn.ModuleList(self._linear(shape, index) for index in range(most // width))
        self._adapt(linears)
        x = self._input(1)
        seconds = time_runs(lambda: [linear(x) for linear in linears], self._device, budget_s)
        return len(linears) * width * self._hidden * self._dtype.itemsize / seconds

    def flops(self, rows: int, expected: float, budget_s: float) -> float:
        """Floating-point operations per second of gated MLPs of the model's size, for `rows` rows.

        `expected` is the rate to plan with: an MLP that would use the budget up at that rate is made narrower.
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

        return count * mlp_flops / time_runs(work, self._device, budget_s)

    def _input(self, rows: int) -> torch.Tensor:
        empty = torch.empty(1, rows, self._hidden, dtype=self._dtype, device=self._device)
        return _fill(empty, self._tile)

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
        _fill(self._buffer, self._tile)
        self._adapter(modules)

    def _linear(self, shape: tuple[int, int], index: int) -> nn.Linear:
        """A linear layer, `(out, in)`, whose weight is number `index` of those of its size in the buffer."""
        size = shape[0] * shape[1]
        linear = nn.Linear(shape[1], shape[0], bias=False, device="meta")
        weight = self._buffer[index * size : (index + 1) * size].view(shape)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        return linear


# -- decoder layers -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Overheads:
    """Seconds beyond the roofline: of each layer, and of a forward pass without layers."""

    layer_s: float
    step_s: float


class RandomLayers:
    """`count` decoder layers of the model, from its middle, on random weights, with one block of KV."""

    def __init__(
        self, architecture: Architecture, device: Device, count: int, backend: AttentionBackend, adapt: Adapter
    ) -> None:
        first = max(0, (architecture.num_layers - count + 1) // 2)
        self._part = StageSlice(first, first + count, architecture.num_layers)
        self._device = torch.device(device.torch_device)
        self._model = _random_stage(architecture, self._part, self._device)
        decoder, name = find_decoder(self._model, architecture.num_layers)
        self._layers: Any = getattr(decoder, name)
        layers = range(first, first + count)
        read = measure_bytes(architecture).one_token()
        self.layer_bytes = sum(read[first : first + count]) / count
        self.layer_flops = 2 * self.layer_bytes / architecture.dtype.itemsize
        adapt(self._model)
        self._context = AttentionContext(backend)
        tokens = max(1, min(16, architecture.max_position))
        shapes = {index: architecture.kv_shapes[index] for index in layers}
        self._kv = PagedKVCache(shapes, 1, tokens, architecture.dtype, device, DeviceBudget(device))
        windows = architecture.sliding_windows
        bound = {
            index: LayerAttention(self._context, index, *self._kv.layer(index), windows[index]) for index in layers
        }
        bind(self._model, bound)
        self._inputs = self._one_token(architecture, tokens)

    def _one_token(self, architecture: Architecture, seq_len: int) -> dict[str, torch.Tensor]:
        """The inputs of a step in which one sequence gets its token number `seq_len`."""
        at = self._device
        self._context.metadata = AttentionMetadata(
            slot_mapping=torch.tensor([seq_len - 1], device=at),
            block_tables=torch.zeros((1, 1), dtype=torch.int32, device=at),
            query_start=torch.tensor([0, 1], dtype=torch.int32, device=at),
            seq_lens=torch.tensor([seq_len], dtype=torch.int32, device=at),
            num_decodes=1,
            host_query_start=(0, 1),
            host_seq_lens=(seq_len,),
        )
        positions = torch.tensor([[seq_len - 1]], device=at)
        if self._part.is_first:
            return {"position_ids": positions, "input_ids": torch.zeros((1, 1), dtype=torch.int64, device=at)}
        hidden = _random_tile(architecture.dtype, at)[: architecture.hidden_size].view(1, 1, -1)
        return {"position_ids": positions, "inputs_embeds": hidden}

    def step(self) -> None:
        """One token through the layers, waited for, as the engine waits for each step."""
        self._model.base_model(use_cache=False, **self._inputs)
        synchronize(self._device)

    def overheads(self, layer_roofline_s: float, budget_s: float) -> Overheads:
        """Times steps with the layers, and then without them; the layers are gone afterwards."""
        count = self._part.last - self._part.first
        with_layers_s = time_runs(self.step, self._device, budget_s / 2)
        for index in range(self._part.first, self._part.last):
            self._layers[index] = PassThrough(self._layers[index])
        empty_s = time_runs(self.step, self._device, budget_s / 2)
        return Overheads(max(0.0, (with_layers_s - empty_s) / count - layer_roofline_s), empty_s)


def choose_layer_count(architecture: Architecture, layer_bytes: int, device: Device, room_bytes: int) -> int:
    """Enough layers that none stays in a cache, as far as the model and the room have them; 0 without room for one."""
    inner = max(1, architecture.num_layers - 2)  # the first and the last bring the vocabulary with them
    wanted = math.ceil(cold_bytes(device) / max(1, layer_bytes))
    return max(0, min(wanted, inner, _MOST_LAYERS, room_bytes // max(1, layer_bytes)))


def _random_stage(architecture: Architecture, part: StageSlice, device: torch.device) -> Any:
    """A stage's model as `load_stage` makes it, with random weights in place of a checkpoint's."""
    kind = stage_class(architecture, part)
    with torch.device("meta"):
        blank = kind._from_config(architecture.config, dtype=architecture.dtype)
    tile = _random_tile(architecture.dtype, device)
    weights = {
        name: _fill(torch.empty(tensor.shape, dtype=architecture.dtype, device=device), tile)
        for name, tensor in blank.state_dict().items()
    }
    with _quiet_transformers():
        model = kind.from_pretrained(
            None,
            config=architecture.config,
            state_dict=weights,
            dtype=architecture.dtype,
            device_map=None if device.type == "cpu" else {"": device},
            attn_implementation=ATTENTION_NAME,
            generation_config=GenerationConfig(),
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
