"""One pipeline stage in this process: some layers of the model, with their pages, on one device."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.costs import Batch, StageTimer
from core.devices import Device, DeviceBudget
from core.execution.attention.interface import (
    ATTENTION_NAME,
    AttentionContext,
    LayerAttention,
    attention_kinds,
    bind,
    unbind,
)
from core.execution.attention.select import LinearAdapter
from core.execution.attention.triton_variants import AttentionKind
from core.execution.known_sequences import KnownSequences, PackedStep
from core.execution.page_mover import BlockBuffers, PageMover
from core.execution.page_sites import sites_of
from core.execution.records import StageReport, StepOutput, StepRecord
from core.execution.results import ResultMaker
from core.execution.rotary import TokenRope, rope_lengths, token_ropes
from core.execution.site_attention import BackendOf, FarSite, SiteAttention
from core.execution.step_buffers import InputBatch, PageDirectory, StepBuffers
from core.execution.step_times import StepTimes
from core.grammars.compiler import Grammars
from core.kv_cache.block_table import RopeBorder
from core.kv_cache.page_ops import StagePart
from core.kv_cache.paged_kv_cache import PagedKVCache
from core.models.architecture import Architecture
from core.models.shared_parts import SharedParts, share_parts
from core.models.stage_model import StageSlice, find_decoder, load_layers, load_stage
from core.quantization.swap import quantized_modules
from core.streaming.stream import Clock, StreamedLayers, StreamManager
from core.transfer import TransferManager

DECODE_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
"""Sequences that a GPU's steps are padded to, so that few sizes occur."""


@dataclass(frozen=True, slots=True)
class KVSetup:
    """What a stage needs to know of KV, beside its own layers. `backend_of` gives the attention of this and of other
    devices; `host` is main memory; `buffers` are the blocks there, without the layers that are kept `elsewhere`; a
    block table has up to `table_width` entries."""

    block_size: int
    table_width: int
    backend_of: BackendOf
    transfer: TransferManager
    host: Device
    buffers: BlockBuffers
    elsewhere: frozenset[int] = frozenset()


class Stage:
    """Weights and KV of layers `part.first .. part.last - 1`. One thread at a time runs it; see `StageHandle`."""

    WEIGHTS = "weights"

    def __init__(
        self, architecture: Architecture, part: StageSlice, device: Device, budget: DeviceBudget,
        timer: StageTimer | None = None, known: KnownSequences | None = None,
    ) -> None:  # fmt: skip
        """`timer` predicts how long a forward pass takes; `known` is shared by the stages of this process."""
        self.architecture = architecture
        self.part = part
        self.device = device
        self.torch_device = torch.device(device.torch_device)
        self.weight_bytes = 0
        self._is_last = part.is_last
        self.kv: PagedKVCache | None = None
        self.stream: StreamManager | None = None
        self.predicted_s = 0.0
        self.overlaps = False
        self.forwards = 0
        self.last_used_s = time.monotonic()
        self.clock = Clock()  # what layers that stream in keep time by
        self.make_sites: Callable[..., SiteAttention] = SiteAttention
        self.busy_s = 0.0  # of forward passes that are over
        self.times: StepTimes | None = None  # of single steps, where somebody wants to know
        self._step = 0
        self._timed: deque[tuple[int, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._reading = threading.Lock()
        self._budget = budget
        self._timer = timer
        self._known = known if known is not None else KnownSequences()
        self._begun: dict[int, tuple[PackedStep, StagePart]] = {}
        self._received: dict[int, torch.Tensor] = {}
        self._computed: dict[int, tuple[PackedStep, torch.Tensor]] = {}
        self._directory = PageDirectory()
        self._results = ResultMaker(architecture.vocab_size, self.torch_device) if part.is_last else None
        self._model: Any = None
        self._context: AttentionContext | None = None
        self._entering: torch.Tensor | None = None
        self._sites: SiteAttention | None = None
        self._mover: PageMover | None = None
        self._buffers: StepBuffers | None = None
        self._ropes: tuple[TokenRope, ...] = ()

    # -- loading ----------------------------------------------------------------------------------------------------

    def load(
        self, path: Path, expected_bytes: int, on_read: Callable[[int], None], adapter: LinearAdapter | None,
        streamed: StreamedLayers | None = None, parts: SharedParts | None = None,
    ) -> None:  # fmt: skip
        """Reserve, then read the weights; `adapter` replaces modules by faster ones for this device. `streamed` layers
        stay in main memory; `expected_bytes` are those of the others. `parts` are not read: another stage's `share`
        has given them.
        """
        parts = parts or SharedParts()
        self._budget.reserve(self.WEIGHTS, expected_bytes)
        self.weight_bytes = expected_bytes
        if streamed is not None:
            self.stream = StreamManager(streamed, self.device, self._budget, self.clock)
        absent = frozenset(streamed.layers if streamed is not None else ())
        part = replace(self.part, without=absent)
        self._model = load_stage(
            self.architecture, path, parts.missing(part), self.torch_device, attention=ATTENTION_NAME, on_read=on_read
        )
        extra = adapter.extra_bytes(self._model) if adapter is not None else 0
        actual = _weight_bytes(self._model) + extra + parts.nbytes
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
        if adapter is not None:
            adapter(self._model)
        parts.put_into(self._model, self.part)
        if self.architecture.rope is not None:
            self._ropes = token_ropes(self._model)
        if not self.part.is_first:
            layers[self.part.first].register_forward_pre_hook(self._enter, with_kwargs=True)
        if self.stream is not None:
            self.stream.adopt({index: layers[index] for index in absent})

    def keep_to(self, grammars: Grammars) -> None:
        """What the last stage keeps to where a sequence has a grammar."""
        if self._results is not None:
            self._results.grammars = grammars

    @property
    def pads_steps(self) -> bool:
        """Whether steps come in few sizes, at addresses that stay: what a GPU could record once and play again."""
        return self.device.is_gpu

    @property
    def is_loaded(self) -> bool:
        """Whether it has its weights."""
        return self._model is not None

    def share(self, wanted: StageSlice, adapter: LinearAdapter | None) -> SharedParts:
        """What a stage with the slice `wanted` on the same device can use of this one's weights, while this one goes
        on; `adapter` is the other one's."""
        streamed = frozenset(self.stream.streamed.layers if self.stream is not None else ())
        rehome = adapter.rehoming() if adapter is not None else unbind

        def copied(module: nn.Module) -> None:
            unbind(module)
            rehome(module)

        return share_parts(self._model, replace(self.part, without=streamed), wanted, copied)

    def allocate_kv(self, num_pages: int, setup: KVSetup) -> None:
        """Allocate local pages of this stage's layers and bind them to its attention modules."""
        layers = range(self.part.first, self.part.last)
        shapes = {index: self.architecture.kv_shapes[index] for index in layers}
        padded = self.pads_steps
        self.kv = PagedKVCache(
            shapes, num_pages, setup.block_size, self.architecture.dtype, self.device, self._budget, scratch=padded
        )
        element = self.kv.dtype.itemsize
        kept = [index for index in range(self.part.first) if index not in setup.elsewhere]
        before = sum(self.architecture.kv_shapes[index].bytes_per_token(element) for index in kept)
        self._mover = PageMover(self.kv, setup.transfer, setup.host, before * setup.block_size, setup.buffers)
        self._sites = self.make_sites(self.device, self.kv, setup.backend_of, setup.transfer)
        self._transfer = setup.transfer
        self._buffers = StepBuffers(
            self.torch_device, setup.block_size, buckets=DECODE_BUCKETS if padded else (),
            table_width=setup.table_width if padded else None, scratch_page=num_pages,
        )  # fmt: skip
        self._context = AttentionContext(setup.backend_of(self.device), self._sites)
        windows = self.architecture.sliding_windows
        bound = {i: LayerAttention(self._context, i, *self.kv.layer(i), windows[i]) for i in layers}
        bind(self._model, bound)

    def borrow_far(self, region_id: int, num_pages: int, far: FarSite) -> None:
        """Use pages of another machine as a region, between steps that do."""
        assert self.kv is not None and self._sites is not None
        self._sites.far[far.device.name] = far
        self.kv.add_far_region(region_id, num_pages, far)

    def attention_kinds(self) -> frozenset[AttentionKind]:
        """How the layers attend, as far as kernels differ; there are pages by then."""
        return attention_kinds(self._model, self.architecture.num_heads)

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before this stage's first layer: put what the previous stage sent where `forward` has its embeddings."""
        if args:
            return (self._entering, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._entering}

    # -- a step -----------------------------------------------------------------------------------------------------

    @property
    def devices(self) -> Sequence[Device]:
        return (self.device,)

    @property
    def inlet(self) -> Stage:
        """Itself: see `put`."""
        return self

    @property
    def outlet(self) -> Device:
        return self.device

    def overlap(self, several: bool) -> None:
        self.overlaps = several

    def begin(self, record: StepRecord, part: StagePart) -> None:
        packed = self._known.take(record)
        self._begun[record.step] = (packed, part)
        if self._results is not None:
            self._results.begin(packed)

    def put(self, step: int, hidden: torch.Tensor) -> None:
        self._received[step] = hidden

    def run(self, step: int) -> None:
        """Move pages, then run the layers. A step without sequences moves pages and computes nothing."""
        packed, part = self._begun.pop(step)
        hidden = self._received.pop(step, None)
        self._move_pages(part)
        if not packed.num_sequences:
            self.settle()
            return
        try:
            batch = self.prepare(packed)
        except BaseException:
            self.settle()  # loads that were begun still read their slots
            raise
        work = Batch(batch.num_tokens, batch.num_kv_tokens, 0 if batch.logit_rows is None else len(batch.logit_rows))
        self._step = step
        self._computed[step] = (packed, self.timed(batch, hidden, work, packed.raw == "hidden_states"))

    def hand_on(self, step: int, inlet: Any) -> None:
        if step in self._computed:
            inlet.put(step, self._transfer.send(self._computed.pop(step)[1], self.device, inlet.device))

    def results(self, step: int) -> StepOutput:
        if step not in self._computed:
            return StepOutput(step)
        assert self._results is not None
        packed, output = self._computed.pop(step)
        return self._results.make(packed, output[0])

    def skip(self, step: int) -> None:
        self._received.pop(step, None)
        begun = self._begun.pop(step, None)
        if begun is not None:
            self._move_pages(begun[1])
            self.settle()

    def _move_pages(self, part: StagePart) -> None:
        """Do what a step asks of the pages before it computes. Loads begin here and end before their layer attends."""
        self._directory.learn(part.placed)
        if part.ops:
            assert self._mover is not None and self._context is not None
            self._context.wait_for = self._mover.apply(part.ops)

    def settle(self) -> None:
        """Let loads that were begun end: a step that has failed does not wait for them. Raises `PageMoveError` if one
        failed."""
        assert self._mover is not None and self._context is not None
        self._context.wait_for = None
        self._mover.finish_loads()

    def prepare(self, packed: PackedStep) -> InputBatch:
        """The step's inputs on the device: one copy."""
        assert self._buffers is not None and self.kv is not None
        regions, pages = self._directory.locate(packed.tables)
        batch = self._buffers.fill(packed, pages)
        if self._ropes and self.architecture.rope is not None:
            batch = replace(batch, rope_lengths=self._rope_lengths(packed, batch.num_tokens, self.architecture.rope))
        if not self._directory.is_told:
            return batch
        sites = sites_of(packed, regions, pages, self.kv.block_size, self.torch_device, self._device_of)
        return replace(batch, attention=replace(batch.attention, sites=sites)) if sites else batch

    def _rope_lengths(self, packed: PackedStep, num_tokens: int, border: RopeBorder) -> torch.Tensor:
        """See `rope_lengths`; tokens that pad the step are sequences of one."""
        lengths = torch.ones(num_tokens, dtype=torch.int64)
        lengths[: packed.num_tokens] = torch.from_numpy(rope_lengths(packed, border))
        return lengths.to(self.torch_device)

    def _device_of(self, region: int) -> tuple[str, torch.device]:
        assert self.kv is not None
        device = self.kv.region(region).device
        return device.name, torch.device(device.torch_device)

    def timed(self, batch: InputBatch, hidden: torch.Tensor | None, work: Batch, wants_hidden: bool) -> torch.Tensor:
        """`forward`, and account for the time it takes. Nothing waits for a GPU here."""
        started_s = time.perf_counter()
        begun = self._mark()
        try:
            return self.forward(batch, hidden, wants_hidden)
        finally:
            self._account(work, started_s, begun)

    @torch.inference_mode()
    def forward(self, batch: InputBatch, hidden: torch.Tensor | None, wants_hidden: bool = False) -> torch.Tensor:
        """Run a step's tokens through the layers: device work alone.

        `hidden` is `[1, T, hidden_size]` from the previous stage, None for the first. Returns `[1, R, vocab]` logits of
        the batch's `logit_rows` from the last stage, otherwise, or if they are wanted, hidden states
        `[1, T, hidden_size]` (after the final norm on the last stage).
        """
        assert self._context is not None
        self._context.metadata, self._entering = batch.attention, hidden
        for rope in self._ropes:
            rope.lengths = batch.rope_lengths
        inputs = {"input_ids": batch.input_ids} if hidden is None else {"inputs_embeds": hidden}
        try:
            if not self._is_last or wants_hidden or batch.logit_rows is None:
                result = self._model.base_model(position_ids=batch.position_ids, use_cache=False, **inputs)[0]
            else:
                result = self._model(
                    position_ids=batch.position_ids, use_cache=False, logits_to_keep=batch.logit_rows, **inputs
                ).logits
        finally:
            self._context.metadata = self._entering = None
            if self._context.wait_for is not None:
                self.settle()
        return result  # type: ignore[no-any-return]

    # -- accounts ---------------------------------------------------------------------------------------------------

    def _mark(self) -> torch.cuda.Event | None:
        """This moment, in the order of what a GPU is given to do."""
        if self.torch_device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.torch_device))
        return event

    def predicted(self, work: Batch) -> float:
        """Seconds that the pass should take; 0 where that is not known."""
        return self._timer.seconds(work, self.overlaps) if self._timer is not None else 0.0

    def _account(self, work: Batch, started_s: float, begun: torch.cuda.Event | None) -> None:
        """The time spent beside the time predicted. A GPU's is read from its own clock, once it is over."""
        self.predicted_s += self.predicted(work)
        ended = self._mark()
        if begun is None or ended is None:
            self._took(self._step, time.perf_counter() - started_s)
        else:
            self._timed.append((self._step, begun, ended))
            self._read_clock()
        self.forwards += 1
        self.last_used_s = time.monotonic()

    def _read_clock(self) -> None:
        """Account for what a GPU has done."""
        with self._reading:
            while self._timed and self._timed[0][2].query():  # type: ignore[no-untyped-call]
                step, begun, ended = self._timed.popleft()
                self._took(step, begun.elapsed_time(ended) / 1e3)

    def _took(self, step: int, seconds: float) -> None:
        self.busy_s += seconds
        if self.times is not None:
            self.times.add(step, seconds)

    def seconds(self, step: int) -> float:
        self._read_clock()
        return self.times.take(step) if self.times is not None else 0.0

    def report(self) -> StageReport:
        stream_wait_s = self.stream.wait_s if self.stream is not None else 0.0
        return StageReport(self.forwards, self.busy_s, self.predicted_s, stream_wait_s, self._budget.used_by_purpose())

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
        self.kv = self.stream = self._model = self._context = self._sites = self._mover = self._buffers = None
        if self._results is not None:
            self._results.close()
        self._results = None
        for held in (self._begun, self._received, self._computed):
            held.clear()
        self._budget.release(self.WEIGHTS)
        if self.torch_device.type == "cuda":
            torch.cuda.empty_cache()


def _weight_bytes(model: nn.Module) -> int:
    """Of parameters, and of quantized weights, each counted once."""
    held = [*model.parameters(), *(tensor for module in quantized_modules(model) for tensor in module.buffers())]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in held}.values())
