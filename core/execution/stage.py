"""One pipeline stage: some layers of the model, with their pages, on one device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.costs import Batch, StageTimer
from core.devices import Device, DeviceBudget
from core.emulation.guest_time import GuestTime
from core.emulation.pace import Pace
from core.execution.attention.interface import (
    ATTENTION_NAME,
    AttentionContext,
    LayerAttention,
    attention_kinds,
    bind,
)
from core.execution.attention.select import LinearAdapter
from core.execution.attention.triton_variants import AttentionKind
from core.execution.input_batch import InputBatch
from core.execution.page_mover import PageMover
from core.execution.placed_batch import place_batch
from core.execution.schedule import SchedulerOutput
from core.execution.site_attention import BackendOf, SiteAttention
from core.kv_cache.page_ops import PageOp, StageStep
from core.kv_cache.paged_kv_cache import PagedKVCache
from core.models.architecture import Architecture
from core.models.stage_model import StageSlice, find_decoder, load_layers, load_stage
from core.streaming.stream import StreamedLayers, StreamManager
from core.transfer import TransferManager


class Stage:
    """Weights and KV of layers `part.first .. part.last - 1`. One thread at a time runs `forward`.

    `overlaps` says whether other stages compute at the same time; it is set between steps.
    """

    WEIGHTS = "weights"

    def __init__(
        self, architecture: Architecture, part: StageSlice, device: Device, budget: DeviceBudget,
        timer: StageTimer | None = None,
    ) -> None:  # fmt: skip
        """`timer` predicts how long a forward pass takes; an emulated device keeps to it."""
        self.architecture = architecture
        self.part = part
        self.device = device
        self.torch_device = torch.device(device.torch_device)
        self.weight_bytes = 0
        self.num_parameters = 0
        self.kv: PagedKVCache | None = None
        self.stream: StreamManager | None = None
        self.busy_s = 0.0
        self.predicted_s = 0.0
        self.overlaps = False
        self.forwards = 0
        self.last_used_s = time.monotonic()
        self._budget = budget
        self._timer = timer
        self._pace = Pace(device, timer, part.first)
        self._model: Any = None
        self._context: AttentionContext | None = None
        self._received: torch.Tensor | None = None
        self._sites: SiteAttention | None = None
        self._guests: GuestTime | None = None
        self._mover: PageMover | None = None

    def load(
        self, path: Path, expected_bytes: int, on_read: Callable[[int], None], adapter: LinearAdapter | None,
        streamed: StreamedLayers | None = None,
    ) -> None:  # fmt: skip
        """Reserve, then read the weights; `adapter` replaces modules by faster ones for this device. `streamed` layers
        stay in main memory; `expected_bytes` are those of the others.
        """
        self._budget.reserve(self.WEIGHTS, expected_bytes)
        self.weight_bytes = expected_bytes
        if streamed is not None:
            self.stream = StreamManager(streamed, self.device, self._budget, self._pace)
        absent = frozenset(streamed.layers if streamed is not None else ())
        part = replace(self.part, without=absent)
        self._model = load_stage(
            self.architecture, path, part, self.torch_device, attention=ATTENTION_NAME, on_read=on_read
        )
        actual = _parameter_bytes(self._model) + (adapter.extra_bytes(self._model) if adapter is not None else 0)
        if actual > expected_bytes:
            self._budget.reserve(self.WEIGHTS, actual - expected_bytes)
            self.weight_bytes = actual
        decoder, name = find_decoder(self._model, self.part.num_layers)
        layers = getattr(decoder, name)
        if absent:
            loaded = load_layers(self.architecture, path, absent, attention=ATTENTION_NAME, on_read=on_read)
            for index, layer in loaded.items():
                layers[index] = layer
            del loaded, layer
        self.num_parameters = sum(parameter.numel() for parameter in self._model.parameters())
        if adapter is not None:
            adapter(self._model)
        if not self.part.is_first:
            layers[self.part.first].register_forward_pre_hook(self._enter, with_kwargs=True)
        if self.stream is not None:
            self.stream.adopt({index: layers[index] for index in absent})

    def allocate_kv(
        self, num_pages: int, block_size: int, backend_of: BackendOf, transfer: TransferManager, host: Device,
        guests: GuestTime,
    ) -> None:  # fmt: skip
        """Allocate local pages of this stage's layers and bind them to its attention modules.

        `backend_of` gives the attention of this and of other devices; `host` is main memory; `guests` is shared by all
        stages of an engine.
        """
        layers = range(self.part.first, self.part.last)
        shapes = {index: self.architecture.kv_shapes[index] for index in layers}
        self.kv = PagedKVCache(shapes, num_pages, block_size, self.architecture.dtype, self.device, self._budget)
        element = self.kv.dtype.itemsize
        before = sum(shape.bytes_per_token(element) for shape in self.architecture.kv_shapes[: self.part.first])
        self._mover = PageMover(self.kv, transfer, host, before * block_size)
        self._sites = SiteAttention(self.device, self.kv, backend_of, transfer, guests)
        self._guests = guests
        self._context = AttentionContext(backend_of(self.device), self._sites)
        windows = self.architecture.sliding_windows
        bound = {i: LayerAttention(self._context, i, *self.kv.layer(i), windows[i]) for i in layers}
        bind(self._model, bound)

    def attention_kinds(self) -> frozenset[AttentionKind]:
        """How the layers attend, as far as kernels differ; there are pages by then."""
        return attention_kinds(self._model, self.architecture.num_heads)

    def move_pages(self, ops: Sequence[PageOp]) -> None:
        """Do what a step asks of the pages before it computes. Loads begin here and end before their layer attends."""
        assert self._mover is not None and self._context is not None
        self._context.wait_for = self._mover.apply(ops)

    def settle(self) -> None:
        """Let loads that were begun end: a step that has failed does not wait for them. Raises `PageMoveError` if one
        failed."""
        assert self._mover is not None and self._context is not None
        self._context.wait_for = None
        self._mover.finish_loads()

    def place(self, batch: InputBatch, output: SchedulerOutput, step: StageStep) -> InputBatch:
        """A step's batch on this stage's device, with this stage's pages."""
        if step.tables is None:
            return batch.to(self.torch_device)
        assert self.kv is not None
        return place_batch(batch, output.sequences, step.tables, self.kv.block_size, self.torch_device, self._device_of)

    def _device_of(self, region: int) -> tuple[str, torch.device]:
        assert self.kv is not None
        device = self.kv.region(region).device
        return device.name, torch.device(device.torch_device)

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before this stage's first layer: put what the previous stage sent where `forward` has its embeddings."""
        if args:
            return (self._received, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._received}

    @torch.inference_mode()
    def forward(self, batch: InputBatch, hidden: torch.Tensor | None, logit_rows: torch.Tensor | None) -> torch.Tensor:
        """Run a step's tokens through the layers.

        Args:
            hidden: `[1, T, hidden_size]` from the previous stage; None for the first.
            logit_rows: int64 `[R]`, rows of the packed batch whose logits are wanted from the last stage; None asks
                for hidden states.

        Returns:
            `[1, R, vocab]` logits or `[1, T, hidden_size]` hidden states (after the final norm on the last stage).
        """
        started_s = time.perf_counter()
        assert self._context is not None
        work = Batch(batch.num_tokens, batch.num_kv_tokens, 0 if logit_rows is None else len(logit_rows))
        self._pace.begin(work)
        if self._guests is not None:
            self._guests.take(self.device.name)  # what was done for others while this device was idle cost it nothing
        self._context.metadata, self._received = batch.attention, hidden
        inputs = {"input_ids": batch.input_ids} if hidden is None else {"inputs_embeds": hidden}
        try:
            if logit_rows is None or not self.part.is_last:
                result = self._model.base_model(position_ids=batch.position_ids, use_cache=False, **inputs)[0]
            else:
                result = self._model(
                    position_ids=batch.position_ids, use_cache=False, logits_to_keep=logit_rows, **inputs
                ).logits
        finally:
            self._context.metadata = self._received = None
            if self._context.wait_for is not None:
                self.settle()
        self._account(started_s, work)
        return result  # type: ignore[no-any-return]

    def _account(self, started_s: float, work: Batch) -> None:
        """Keep an emulated device's pace, and the time spent beside the time predicted."""
        waited_s = self._waited_s()
        predicted_s = (self._timer.seconds(work, self.overlaps) if self._timer is not None else 0.0) + waited_s
        self._pace.end(waited_s)
        if self.torch_device.type == "cuda":
            torch.cuda.current_stream(self.torch_device).synchronize()
        self.predicted_s += predicted_s
        self.busy_s += time.perf_counter() - started_s
        self.forwards += 1
        self.last_used_s = time.monotonic()

    def _waited_s(self) -> float:
        """What an emulated device had to wait for others in this step, and what it did for others meanwhile."""
        sites, guests = self._sites, self._guests
        if sites is None or guests is None or self.device.speed is None:
            return 0.0
        waited_s, sites.extra_s = sites.extra_s, 0.0
        return waited_s + guests.take(self.device.name)

    def free(self) -> None:
        """Give weights and pages back to the device."""
        if self._sites is not None:
            self._sites.close()
        if self._mover is not None:
            self._mover.close()
        if self.stream is not None:
            self.stream.close()
        if self.kv is not None:
            self.kv.free()
        self.kv = self.stream = self._model = self._context = self._sites = self._mover = None
        self._budget.release(self.WEIGHTS)
        if self.torch_device.type == "cuda":
            torch.cuda.empty_cache()


def _parameter_bytes(model: nn.Module) -> int:
    unique = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in model.parameters()}
    return sum(unique.values())
