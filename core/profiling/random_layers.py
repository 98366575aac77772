"""Decoder layers of a model on random weights, to be timed: the model's own architecture, bound to pages as a stage
binds them, in steps of any number of sequences."""

from __future__ import annotations

import math
from typing import Any

import torch

from core.devices import Device, DeviceBudget
from core.execution.attention.interface import ATTENTION_NAME, AttentionBackend, AttentionContext, LayerAttention, bind
from core.execution.attention.metadata import AttentionMetadata
from core.kv_cache.paged_kv_cache import PagedKVCache
from core.models.architecture import Architecture
from core.models.blank import BUILDING
from core.models.stage_model import (
    PassThrough,
    StageSlice,
    build_stage,
    find_decoder,
    measure_bytes,
    stage_class,
)
from core.profiling import measure
from core.profiling.measure import Adapter, fill, random_tile, synchronize

SHORT = 64
"""Tokens of the sequences in a step, as far as the model has positions: few, so that reading KV hardly counts."""

KV_ROWS, _LONG, _MOST_KV_TOKENS = 8, 1024, 131_072
"""Sequences of a step that reads much KV, tokens of each at least, and of all at most."""

_MOST_LAYERS = 8
_BLOCK = 16


class RandomLayers:
    """`count` decoder layers of the model, from its middle, with KV for `most_tokens` tokens, in whole blocks each
    sequence.

    Steps compute the last token of sequences whose others are there.
    """

    def __init__(
        self, architecture: Architecture, device: Device, count: int, backend: AttentionBackend, adapt: Adapter,
        most_tokens: int = SHORT,
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
        self.short = max(1, min(SHORT, architecture.max_position))
        whole_blocks = most_tokens // KV_ROWS // _BLOCK * _BLOCK
        self.long = max(self.short, min(whole_blocks, architecture.max_position))
        layers = range(first, first + count)
        shapes = {index: architecture.kv_shapes[index] for index in layers}
        self._pages = -(-most_tokens // _BLOCK)
        kv = PagedKVCache(shapes, self._pages, _BLOCK, architecture.dtype, device, DeviceBudget(device))
        self._tile = random_tile(architecture.dtype, self.device)
        self._real = {index: self._layers[index] for index in layers}
        bound = {}
        for index in layers:
            keys, values = (fill(pages, self._tile) for pages in kv.layer(index))
            bound[index] = LayerAttention(self._context, index, keys, values, architecture.sliding_windows[index])
        bind(self._model, bound)
        self.set_step(1, self.short)

    def set_step(self, rows: int, context: int) -> None:
        """From now on a step computes token number `context` of each of `rows` sequences.

        Raises `ValueError` for more blocks than there are pages.
        """
        at, blocks = self.device, -(-context // _BLOCK)
        if rows * blocks > self._pages:
            raise ValueError(f"{rows} sequences of {blocks} blocks, but {self._pages} pages")
        tables = torch.arange(rows * blocks, dtype=torch.int32, device=at).view(rows, blocks)
        self._context.metadata = AttentionMetadata(
            slot_mapping=tables[:, -1].long() * _BLOCK + (context - 1) % _BLOCK,
            block_tables=tables,
            query_start=torch.arange(rows + 1, dtype=torch.int32, device=at),
            seq_lens=torch.full((rows,), context, dtype=torch.int32, device=at),
            num_decodes=rows,
            host_query_start=tuple(range(rows + 1)),
            host_seq_lens=(context,) * rows,
            max_query_len=1,
        )
        positions = torch.full((1, rows), context - 1, device=at)
        if self._part.is_first:
            ids = torch.arange(rows, device=at).remainder_(self._architecture.vocab_size).view(1, rows)
            self._inputs = {"position_ids": positions, "input_ids": ids}
            return
        hidden = torch.empty(1, rows, self._architecture.hidden_size, dtype=self._architecture.dtype, device=at)
        self._inputs = {"position_ids": positions, "inputs_embeds": fill(hidden, self._tile)}

    def work(self, rows: int) -> tuple[float, float]:
        """Bytes of weights that a layer reads for `rows` tokens, and its operations for all of them; means."""
        layers, weights = range(self._part.first, self._part.last), self._weights
        read = sum(weights.read_bytes(layer, rows) for layer in layers)
        parameters = sum(
            weights.layer_parameters[layer] * weights.read_bytes(layer, 1) / weights.layers[layer] for layer in layers
        )
        return read / self.count, rows * 2 * parameters / self.count

    def step(self) -> None:
        """One step through the layers, waited for, as the engine waits for each step."""
        self._model.base_model(use_cache=False, **self._inputs)
        synchronize(self.device)

    def pass_by(self, passing: bool) -> None:
        """Whether steps pass the layers by from now on."""
        for index, layer in self._real.items():
            self._layers[index] = PassThrough(layer) if passing else layer

    def kv_bytes(self, context: int) -> float:
        """Bytes of KV that a layer reads for a token at position `context`; the mean of the layers, some of which may
        look back no further than a window."""
        model, element = self._architecture, self._architecture.dtype.itemsize
        seen = {index: min(context, model.sliding_windows[index] or context) for index in self._real}
        return sum(seen[index] * model.kv_shapes[index].bytes_per_token(element) for index in seen) / self.count


def many_tokens(architecture: Architecture) -> int:
    """Of KV, so many that reading it takes a good part of a layer's time: a quarter of the bytes of its weights."""
    layer_bytes, kv_bytes = _largest(architecture)
    return min(_MOST_KV_TOKENS, max(KV_ROWS * _LONG, layer_bytes // (4 * kv_bytes)))


def layer_room(architecture: Architecture, kv_tokens: int) -> int:
    """Bytes of a layer with KV for so many tokens."""
    layer_bytes, kv_bytes = _largest(architecture)
    return layer_bytes + kv_bytes * kv_tokens


def choose_layer_count(architecture: Architecture, device: Device, room_bytes: int, kv_tokens: int) -> int:
    """Enough layers that none stays in a cache, as far as the model and the room have them, with KV for so many tokens;
    0 without room for one."""
    inner = max(1, architecture.num_layers - 2)  # the first and the last bring the vocabulary with them
    layer_bytes, kv_bytes = _largest(architecture)
    wanted = math.ceil(measure.cold_bytes(device) / layer_bytes)
    return max(0, min(wanted, inner, _MOST_LAYERS, room_bytes // (layer_bytes + kv_bytes * kv_tokens)))


def _largest(architecture: Architecture) -> tuple[int, int]:
    """Bytes of a layer's weights, and of its KV for a token."""
    kv_bytes = max(shape.bytes_per_token(architecture.dtype.itemsize) for shape in architecture.kv_shapes)
    return max(1, *measure_bytes(architecture).layers), max(1, kv_bytes)


def _random_stage(architecture: Architecture, part: StageSlice, device: torch.device) -> Any:
    """A stage's model as `load_stage` makes it, with random weights in place of a checkpoint's."""
    with BUILDING, torch.device("meta"):
        blank = stage_class(architecture, part)._from_config(architecture.config, dtype=architecture.dtype)
    tile = random_tile(architecture.dtype, device)
    weights = {
        name: fill(torch.empty(tensor.shape, dtype=architecture.dtype, device=device), tile)
        for name, tensor in blank.state_dict().items()
    }
    return build_stage(architecture, part, device, weights, ATTENTION_NAME)[0]
