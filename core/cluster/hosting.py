"""The stages that this node computes for a master: loaded, given pages, connected and freed as it is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from core.cluster.checkpoints import Ask, CheckpointStore
from core.cluster.hosted_stage import HostedStage, Outlet, ToMaster, ToNextStage
from core.cluster.kept_blocks import KeptBlocks, StageParts
from core.cluster.messages import (
    Allocate,
    Allocated,
    Connect,
    CopyPages,
    DeviceInfo,
    Keep,
    Load,
    Loaded,
    Measure,
    ModelRef,
    PageBytes,
    Profiles,
    ReadPages,
    Release,
    StageUse,
    WritePages,
)
from core.cluster.stage_wire import RemoteInlet
from core.config import Settings
from core.costs import StageTimer
from core.devices import Device, DeviceBudget, host_device
from core.emulation import EmulatedStage, GuestTime
from core.errors import CheckpointError, InvalidRequestError, NotFoundError
from core.execution.attention.select import AttentionBackends
from core.execution.attention.warm_up import warm_up_attention
from core.execution.stage import KVSetup, Stage
from core.execution.threads import CpuThreads
from core.grammars.compiler import Grammars
from core.grammars.vocabulary import Vocabulary
from core.kv_cache.page_ops import LOCAL
from core.kv_cache.paged_kv_cache import PagedKVCache
from core.models.architecture import DTYPES, Architecture, read_architecture
from core.models.stage_model import StageSlice
from core.network.link import Link
from core.profiling.profiler import LayerProfiler
from core.quantization.choice import QuantizeChoice
from core.transfer import TransferManager

WORKSPACE = "workspace"


@dataclass(frozen=True, slots=True)
class _Placed:
    """A stage and what belongs to it. `budget` is its part of its device's ledger."""

    stage: Stage
    budget: DeviceBudget
    backends: AttentionBackends
    device: Device
    parts: StageParts


def _same(vocabulary: Vocabulary) -> Vocabulary:
    return vocabulary


def device_info(device: Device) -> DeviceInfo:
    """What a master is told of a device."""
    speed = device.speed
    bandwidth, flops = (None, None) if speed is None else (speed.bandwidth_bytes_s, speed.flops)
    return DeviceInfo(device.name, device.kind, device.memory_limit_bytes, bandwidth, flops)


class StageHost:
    """See the module. `hosted` has the stages that are connected, by number, for the links' ends.

    `link_to` gives the link to a node that was reached before, or (None) to the master. Called in one thread.
    """

    def __init__(
        self, settings: Settings, devices: Sequence[Device], transfer: TransferManager,
        link_to: Callable[[str | None], Link], ask: Ask, blocks: KeptBlocks,
    ) -> None:  # fmt: skip
        self.hosted: dict[int, HostedStage] = {}
        self.blocks = blocks
        self._settings = settings
        self._devices = {device.name: device for device in devices}
        self._ledgers = {device.name: DeviceBudget(device) for device in devices}
        self._transfer = transfer
        self._link_to = link_to
        self._ask = ask
        self._checkpoints = CheckpointStore(settings.runtime.cache_dir)
        self._placed: dict[int, _Placed] = {}
        self._guests = GuestTime()
        self._cpu_threads = settings.devices.cpu_threads or torch.get_num_threads()

    # -- calls ------------------------------------------------------------------------------------------------------

    def measure(self, asked: Measure) -> Profiles:
        """Only while nothing else computes here, or the numbers are too low."""
        settings = self._as_served(asked.engine, asked.model.dtype)
        profiler = LayerProfiler(settings, self._transfer, self._cpu_threads, budget_s=settings.devices.profile_seconds)
        devices = [self._device(name) for name in asked.devices]
        return Profiles(profiler.devices(devices, self._architecture(asked.model)))

    def load(self, asked: Load) -> Loaded:
        """Raises what loading raises; nothing is kept then."""
        if asked.stage in self._placed:
            raise InvalidRequestError(f"stage {asked.stage} is there already")
        device = self._device(asked.device)
        architecture = self._architecture(asked.model)
        if not 0 <= asked.first < asked.last <= asked.layers == architecture.num_layers:
            raise InvalidRequestError(f"layers {asked.first} to {asked.last} of {asked.layers} are none of the model's")
        settings = self._as_served(asked.engine, asked.model.dtype)
        threads = CpuThreads(self._cpu_threads, max(1, asked.together))
        threads.overlap(asked.together > 1)
        backends = AttentionBackends(settings, threads)
        budget = DeviceBudget(device, within=self._ledgers[device.name])
        stage = self._make_stage(asked, architecture, device, budget)
        try:
            path = self._checkpoints.find(asked.model, self._ask)
            if asked.vocabulary is not None:
                stage.keep_to(Grammars(partial(_same, asked.vocabulary)))
            stage.load(path, asked.weight_bytes, lambda nbytes: None, backends.of(device)[1])
            budget.reserve(WORKSPACE, asked.workspace_bytes)
        except BaseException:
            _free(stage, budget)
            raise
        self._placed[asked.stage] = _Placed(stage, budget, backends, device, StageParts())
        return Loaded(stage.weight_bytes)

    def _make_stage(self, asked: Load, architecture: Architecture, device: Device, budget: DeviceBudget) -> Stage:
        part = StageSlice(asked.first, asked.last, asked.layers)
        timer = None
        if asked.costs is not None and asked.profile is not None:
            timer = StageTimer(asked.costs, asked.profile, asked.first, asked.last)
        if device.is_emulated:
            return EmulatedStage(architecture, part, device, budget, timer, guests=self._guests)
        return Stage(architecture, part, device, budget, timer)

    def allocate(self, asked: Allocate) -> Allocated:
        """Raises `OutOfDeviceMemoryError`."""
        placed, keeps_bytes = self._stage(asked.stage), self.blocks.keeps_bytes
        before = frozenset(range(placed.stage.part.first))
        setup = KVSetup(
            asked.block_size, asked.table_width, placed.backends, self._transfer, host_device(), placed.parts, before
        )
        placed.stage.allocate_kv(asked.pages, setup)
        warm_up_attention([(placed.device, placed.stage.attention_kinds())], (), placed.backends)
        assert placed.stage.kv is not None
        return Allocated(placed.stage.kv.page_bytes, placed.backends(placed.device).name, keeps_bytes)

    def keep(self, asked: Keep) -> None:
        """Raises `OutOfDeviceMemoryError`, and `InvalidRequestError` for a stage without pages."""
        placed = self._stage(asked.stage)
        kv = placed.stage.kv
        if kv is None:
            raise InvalidRequestError(f"stage {asked.stage} has no pages yet")
        self.blocks.keep(asked.memory, placed.parts, asked.slots, kv.page_bytes, pin=placed.device.is_gpu)

    def connect(self, asked: Connect) -> None:
        """From now on the stage computes what the master tells it."""
        placed, host = self._stage(asked.stage), host_device()
        outlet: Outlet
        if asked.node is not None:
            outlet = ToNextStage(RemoteInlet(self._link_to(asked.node), asked.next, host))
        else:
            link = self._link_to(None)
            outlet = ToMaster(link, asked.stage, RemoteInlet(link, asked.stage, host) if asked.feeds else None)
        self.hosted[asked.stage] = HostedStage(
            placed.stage, outlet, takes_hidden=asked.takes_hidden, called=asked.called
        )

    def read_pages(self, asked: ReadPages) -> PageBytes:
        """Raises `InvalidRequestError` for pages or layers that are not there."""
        kv = self._kv(asked.stage, asked.layers, asked.pages)
        with torch.inference_mode():
            return PageBytes(bytes(kv.pack(LOCAL, asked.pages, asked.layers).cpu().numpy().data))

    def write_pages(self, asked: WritePages) -> None:
        """Raises `InvalidRequestError` for pages or layers that are not there, or other bytes than theirs."""
        kv = self._kv(asked.stage, asked.layers, asked.pages)
        if len(asked.data) != len(asked.pages) * sum(kv.layer_bytes[layer] for layer in asked.layers):
            raise InvalidRequestError(f"{len(asked.data)} bytes are not those of {len(asked.pages)} pages")
        data = torch.frombuffer(bytearray(asked.data), dtype=torch.uint8).view(len(asked.pages), -1)
        with torch.inference_mode():
            kv.unpack(LOCAL, asked.pages, data.to(kv.region(LOCAL).device.torch_device), asked.layers)

    def copy_pages(self, asked: CopyPages) -> None:
        """Raises `InvalidRequestError` for pages or layers that are not there."""
        source = self._kv(asked.stage, asked.layers, asked.pages)
        target = self._kv(asked.to, asked.layers, asked.others)
        if len(asked.pages) != len(asked.others):
            raise InvalidRequestError(f"{len(asked.pages)} pages cannot be copied to {len(asked.others)}")
        with torch.inference_mode():
            packed = source.pack(LOCAL, asked.pages, asked.layers)
            where = source.region(LOCAL).device, target.region(LOCAL).device
            target.unpack(LOCAL, asked.others, self._transfer.send(packed, *where), asked.layers)

    def _kv(self, number: int, layers: Sequence[int], pages: Sequence[int]) -> PagedKVCache:
        kv = self._stage(number).stage.kv
        if kv is None or not set(layers) <= set(kv.layer_bytes) or max(pages) >= kv.num_pages:
            raise InvalidRequestError(f"stage {number} has no such layers or pages")
        return kv

    def release(self, asked: Release) -> None:
        """Nothing of these stages is in flight any more, and nothing of these memories is asked for."""
        for number in asked.numbers:
            self._free(number)
            self.blocks.release(number)

    def close(self) -> None:
        """Free everything: there is no master any more."""
        for number in list(self._placed):
            self._free(number)
        self.blocks.close()

    def uses(self) -> tuple[StageUse, ...]:
        """What the stages have done so far. Any thread."""
        reports = [(number, placed.stage.report()) for number, placed in list(self._placed.items())]
        return tuple(StageUse(number, each.forwards, each.busy_s, each.predicted_s) for number, each in reports)

    def sends_over_lost_links(self) -> bool:
        """Whether the results of some stage have nowhere to go."""
        return any(stage.is_cut_off for stage in list(self.hosted.values()))

    def used_by_purpose(self) -> dict[str, dict[str, int]]:
        """Bytes by device and purpose."""
        return {name: ledger.used_by_purpose() for name, ledger in self._ledgers.items()}

    # ---------------------------------------------------------------------------------------------------------------

    def _free(self, number: int) -> None:
        hosted, placed = self.hosted.pop(number, None), self._placed.pop(number, None)
        if hosted is not None:
            hosted.wait_until_idle()
        if placed is not None:
            _free(placed.stage, placed.budget)

    def _stage(self, number: int) -> _Placed:
        if number not in self._placed:
            raise NotFoundError(f"stage {number} is not there")
        return self._placed[number]

    def _device(self, name: str) -> Device:
        if name not in self._devices:
            raise NotFoundError(f"{name} is not there; there are {', '.join(self._devices)}")
        return self._devices[name]

    def _architecture(self, model: ModelRef) -> Architecture:
        if model.dtype not in DTYPES:
            raise CheckpointError(f"{model.dtype} is no dtype that models are served in.")
        try:
            quantize = QuantizeChoice.parse(model.quantize)
        except ValueError as error:
            raise CheckpointError(f"{model.quantize!r} is no way to quantize a model.") from error
        path = self._checkpoints.find(model, self._ask)
        return replace(read_architecture(path, quantize=quantize), dtype=DTYPES[model.dtype])

    def _as_served(self, engine: dict[str, Any], dtype: str) -> Settings:
        """This node's settings with those of the master's engine, but for the processor's instructions."""
        own, now = self._settings.engine, dict(engine)
        now["cpu_instructions"], now["native_kernels"] = own.cpu_instructions, own.native_kernels
        return self._settings.model_copy(
            update={
                "engine": type(own).model_validate(now),
                "model": self._settings.model.model_copy(update={"dtype": dtype}),
            }
        )


def _free(stage: Stage, budget: DeviceBudget) -> None:
    stage.free()
    for purpose in budget.used_by_purpose():
        budget.release(purpose)
