"""Decoder layers of a model on random weights, to be timed: the model's own architecture, bound to pages as a stage
binds them, in steps of any number of sequences."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from core.devices import Device, DeviceBudget
from core.execution import measure
from core.execution.attention.interface import (
    ATTENTION_NAME,
    AttentionBackend,
    AttentionContext,
    LayerAttention,
    bind,
)
from core.execution.attention.metadata import AttentionMetadata
from core.execution.measure import Adapter, fill, random_tile, synchronize
from core.kv_cache.paged_kv_cache import PagedKVCache
from core.models.architecture import Architecture
from core.models.stage_model import PassThrough, StageSlice, find_decoder, measure_bytes, stage_class

_MOST_LAYERS = 8
_CONTEXT = 16


class RandomLayers:
    """`count` decoder layers of the model, from its middle, with a block of KV for each of `most_rows` sequences.

    Sequences have 16 tokens, of which a step computes the last, so that reading KV does not count.
    """

    def __init__(
        self, architecture: Architecture, device: Device, count: int, backend: AttentionBackend, adapt: Adapter,
        most_rows: int = 1,
    ) -> None:  # fmt: skip
        first = max(0, (architecture.num_layers - count + 1) // 2)
        self.count = count
        self.device = torch.device(device.torch_device)
        self._architecture = architecture
        self._part = StageSlice(first, first + count, architecture.num_layers)
        self._model = _random_stage(architecture, self._part, self.device)
        decoder, name = find_decoder(self._model, architecture.num_layers)
        self._layers: Any = getattr(decoder, name)
        self._weights = measure_bytes(architecture)
        adapt(self._model)
        self._context = AttentionContext(backend)
        self._tokens = max(1, min(_CONTEXT, architecture.max_position))
        layers = range(first, first + count)
        shapes = {index: architecture.kv_shapes[index] for index in layers}
        self._kv = PagedKVCache(shapes, most_rows, self._tokens, architecture.dtype, device, DeviceBudget(device))
        windows = architecture.sliding_windows
        bound = {
            index: LayerAttention(self._context, index, *self._kv.layer(index), windows[index]) for index in layers
        }
        bind(self._model, bound)
        self.set_rows(1)

    def set_rows(self, rows: int) -> None:
        """From now on a step computes the newest token of each of `rows` sequences."""
        at, tokens = self.device, self._tokens
        self._context.metadata = AttentionMetadata(
            slot_mapping=torch.arange(1, rows + 1, device=at) * tokens - 1,
            block_tables=torch.arange(rows, dtype=torch.int32, device=at).view(rows, 1),
            query_start=torch.arange(rows + 1, dtype=torch.int32, device=at),
            seq_lens=torch.full((rows,), tokens, dtype=torch.int32, device=at),
            num_decodes=rows,
            host_query_start=tuple(range(rows + 1)),
            host_seq_lens=(tokens,) * rows,
        )
        positions = torch.full((1, rows), tokens - 1, device=at)
        if self._part.is_first:
            ids = torch.arange(rows, device=at).remainder_(self._architecture.vocab_size).view(1, rows)
            self._inputs = {"position_ids": positions, "input_ids": ids}
            return
        hidden = torch.empty(1, rows, self._architecture.hidden_size, dtype=self._architecture.dtype, device=at)
        tile = random_tile(self._architecture.dtype, at)
        self._inputs = {"position_ids": positions, "inputs_embeds": fill(hidden, tile)}

    def work(self, rows: int) -> tuple[float, float]:
        """Bytes of weights that a layer reads for `rows` tokens, and its operations for all of them; means."""
        layers, itemsize = range(self._part.first, self._part.last), self._architecture.dtype.itemsize
        read, one = (sum(self._weights.read_bytes(layer, tokens) for layer in layers) for tokens in (rows, 1))
        return read / self.count, rows * 2 * one / itemsize / self.count

    def step(self) -> None:
        """One step through the layers, waited for, as the engine waits for each step."""
        self._model.base_model(use_cache=False, **self._inputs)
        synchronize(self.device)

    def drop_layers(self) -> None:
        """From now on steps pass them by."""
        for index in range(self._part.first, self._part.last):
            self._layers[index] = PassThrough(self._layers[index])


def choose_layer_count(architecture: Architecture, layer_bytes: int, device: Device, room_bytes: int) -> int:
    """Enough layers that none stays in a cache, as far as the model and the room have them; 0 without room for one."""
    inner = max(1, architecture.num_layers - 2)  # the first and the last bring the vocabulary with them
    wanted = math.ceil(measure.cold_bytes(device) / max(1, layer_bytes))
    return max(0, min(wanted, inner, _MOST_LAYERS, room_bytes // max(1, layer_bytes)))


def _random_stage(architecture: Architecture, part: StageSlice, device: torch.device) -> Any:
    """A stage's model as `load_stage` makes it, with random weights in place of a checkpoint's."""
    kind = stage_class(architecture, part)
    with torch.device("meta"):
        blank = kind._from_config(architecture.config, dtype=architecture.dtype)
    tile = random_tile(architecture.dtype, device)
    weights = {
        name: fill(torch.empty(tensor.shape, dtype=architecture.dtype, device=device), tile)
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
