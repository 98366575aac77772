"""The stages that this node computes for a master: loaded, given pages, connected and freed as it is told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from core.cluster.checkpoints import Ask, CheckpointStore
from core.cluster.group_path import Way
from core.cluster.guest_calls import FarDevice, GuestCalls
from core.cluster.guests import GuestForm, Guests
from core.cluster.hosted_stage import HostedStage, Outlet, ToMaster, ToNextStage
from core.cluster.kept_blocks import KeptBlocks, StageParts
from core.cluster.lending_messages import AddGuest, AddRegion, Borrow, DropRegion, ExpectGuests
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
    MeasurePaths,
    ModelRef,
    PageBytes,
    Path,
    Paths,
    Profiles,
    ReadPages,
    Release,
    StageUse,
    WritePages,
)
from core.cluster.stage_wire import RemoteInlet
from core.config import Settings
from core.costs import SLOTS, StageTimer
from core.costs.profile import FREE_LINK
from core.devices import HOST, Device, DeviceBudget, host_device
from core.devices.pressure import CardWatch
from core.emulation import EmulatedStage, GuestTime
from core.errors import CheckpointError, InvalidRequestError, NotFoundError
from core.execution.attention.select import AttentionBackends
from core.execution.attention.warm_up import warm_up_attention, warm_up_lender
from core.execution.stage import KVSetup, Stage
from core.execution.threads import CpuThreads
from core.grammars.compiler import Grammars
from core.grammars.vocabulary import Vocabulary
from core.kv_cache.paged_kv_cache import PagedKVCache
from core.logs import get_logger
from core.models.architecture import DTYPES, Architecture, KVShape, read_architecture
from core.models.stage_model import StageSlice
from core.profiling.link_profiler import LinkProfiler
from core.profiling.profiler import LayerProfiler
from core.quantization.choice import QuantizeChoice
from core.streaming.stream import StreamedLayers, StreamManager
from core.transfer import TransferManager

logger = get_logger(__name__)

WORKSPACE = "workspace"


@dataclass(frozen=True, slots=True)
class _Placed:
    """A stage and what belongs to it. `budget` is its part of its device's ledger, `far` are devices of other machines
    that lend to it."""

    stage: Stage
    budget: DeviceBudget
    backends: AttentionBackends
    device: Device
    parts: StageParts
    far: dict[str, FarDevice] = field(default_factory=dict)


def _same(vocabulary: Vocabulary) -> Vocabulary:
    return vocabulary


def device_info(device: Device) -> DeviceInfo:
    """What a master is told of a device."""
    speed = device.speed
    bandwidth, flops = (None, None) if speed is None else (speed.bandwidth_bytes_s, speed.flops)
    return DeviceInfo(device.name, device.kind, device.memory_limit_bytes, bandwidth, flops)


class StageHost:
    """See the module. `hosted` has the stages that are connected, by number, for the links' ends.

    `main` is the ledger of main memory; `way_to` gives the link and the path to a node that was reached before, or
    (None) to the master. Called in one thread, but for regions, guests and what is borrowed, which have another.
    """

    def __init__(
        self, settings: Settings, devices: Sequence[Device], main: DeviceBudget, transfer: TransferManager,
        way_to: Callable[[str | None], Way], ask: Ask, blocks: KeptBlocks,
    ) -> None:  # fmt: skip
        self.hosted: dict[int, HostedStage] = {}
        self.blocks = blocks
        self._settings = settings
        self._devices = {device.name: device for device in devices}
        self._ledgers = {device.name: DeviceBudget(device) for device in devices}
        self._main = main
        self._watched: frozenset[str] = frozenset()
        self._lenders: tuple[Device, ...] = ()
        self._watching = threading.Lock()
        self._watch = CardWatch((), self._ledgers, PagedKVCache.LENT)
        self._unwatched = ""
        self._transfer = transfer
        self._way_to = way_to
        self._ask = ask
        self._checkpoints = CheckpointStore(settings.runtime.cache_dir)
        self._placed: dict[int, _Placed] = {}
        self._guest_time = GuestTime()
        self.guests = Guests()
        self._lender_backends: tuple[dict[str, Any], AttentionBackends] | None = None
        self._cpu_threads = settings.devices.cpu_threads or torch.get_num_threads()

    # -- calls ------------------------------------------------------------------------------------------------------

    def measure(self, asked: Measure) -> Profiles:
        """Only while nothing else computes here, or the numbers are too low."""
        settings = self._as_served(asked.engine, asked.model.dtype)
        profiler = LayerProfiler(settings, self._transfer, self._cpu_threads, budget_s=settings.devices.profile_seconds)
        devices = [self._device(name) for name in asked.devices]
        return Profiles(profiler.devices(devices, self._architecture(asked.model)))

    def measure_paths(self, asked: MeasurePaths) -> Paths:
        """What was measured before is known."""
        profiler = LinkProfiler(
            self._settings, self._transfer, self._cpu_threads, self._settings.devices.profile_seconds
        )
        devices = [self._device(name) for name in asked.devices]
        links = {**profiler.links(devices).links, **profiler.host_links(devices)}
        return Paths(tuple(Path(source, target, link) for (source, target), link in links.items()))

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
            streamed, resident = None, asked.weight_bytes
            if asked.streamed:
                sizes = (asked.streamed, asked.streamed_bytes, asked.slot_bytes)
                streamed = StreamedLayers(*sizes, self._main, self._transfer)
                resident = max(0, asked.weight_bytes - SLOTS * asked.slot_bytes)
            stage.load(path, resident, lambda nbytes: None, backends.of(device)[1], streamed)
            budget.reserve(WORKSPACE, asked.workspace_bytes)
        except BaseException:
            _free(stage, budget)
            raise
        self._placed[asked.stage] = _Placed(stage, budget, backends, device, StageParts())
        return Loaded(stage.weight_bytes + budget.used_by_purpose().get(StreamManager.PURPOSE, 0))

    def _make_stage(self, asked: Load, architecture: Architecture, device: Device, budget: DeviceBudget) -> Stage:
        part = StageSlice(asked.first, asked.last, asked.layers)
        timer = None
        if asked.costs is not None and asked.profile is not None:
            link = asked.host_link or FREE_LINK
            timer = StageTimer(asked.costs, asked.profile, asked.first, asked.last, asked.streamed, link)
        if device.is_emulated:
            return EmulatedStage(architecture, part, device, budget, timer, guests=self._guest_time)
        return Stage(architecture, part, device, budget, timer)

    def allocate(self, asked: Allocate) -> Allocated:
        """Raises `OutOfDeviceMemoryError`."""
        placed, keeps_bytes = self._stage(asked.stage), self.blocks.keeps_bytes
        before = frozenset(range(placed.stage.part.first))
        setup = KVSetup(
            asked.block_size, asked.table_width, placed.backends, self._transfer, host_device(), placed.parts, before
        )
        placed.stage.allocate_kv(asked.pages, setup)
        lenders = [self._device(name) for name in asked.lenders]
        warm_up_attention([(placed.device, placed.stage.attention_kinds())], lenders, placed.backends)
        self._watch_cards(lenders)
        assert placed.stage.kv is not None
        return Allocated(placed.stage.kv.page_bytes, placed.backends(placed.device).name, keeps_bytes)

    def _watch_cards(self, lenders: Sequence[Device] | None = None) -> None:
        """Those in use, and no others: looking at a card takes some of its memory."""
        with self._watching:
            self._lenders = tuple(lenders) if lenders is not None else self._lenders
            used = (*(each.device for each in list(self._placed.values())), *self._lenders, *self.guests.devices())
            devices = {device.name: device for device in used}
            self._watched = frozenset(devices)
            self._watch = CardWatch(tuple(devices.values()), self._ledgers, PagedKVCache.LENT)

    def add_region(self, asked: AddRegion) -> None:
        """Raises `OutOfDeviceMemoryError`, with nothing kept, and `InvalidRequestError` for a stage without pages."""
        kv = self._pages(asked.stage)
        if asked.region in kv.regions:
            kv.drop_region(asked.region)
        budget = self._main if asked.device == HOST else self._ledgers[self._device(asked.device).name]
        kv.add_region(asked.region, asked.pages, budget.device, budget)

    def drop_region(self, asked: DropRegion) -> None:
        """Give its memory back to the device, and what the allocator keeps of it to other programs."""
        kv = self._pages(asked.stage)
        if asked.region in kv.regions:
            kv.drop_region(asked.region)

    def borrow(self, asked: Borrow, calls: GuestCalls) -> None:
        """Over the link that `calls` is an end of. Raises `InvalidRequestError` for a stage without pages."""
        placed, kv = self._stage(asked.stage), self._pages(asked.stage)
        far = placed.far.get(asked.lender)
        if far is None or far.is_over:
            shapes = {layer: placed.stage.architecture.kv_shapes[layer] for layer in kv.layer_bytes}
            far = FarDevice(calls, asked.stage, asked.lender, shapes, kv.block_size, kv.dtype)
            placed.far[asked.lender] = far
        if asked.region in kv.regions:
            kv.drop_region(asked.region)
        placed.stage.borrow_far(asked.region, asked.pages, far)

    def add_guest(self, asked: AddGuest) -> None:
        """Raises `OutOfDeviceMemoryError`, with nothing kept, `CheckpointError` for a dtype that no model has."""
        device, (form, backends) = self._device(asked.device), self._guest_form(asked)
        self.guests.add(
            asked.guest, asked.region, asked.pages, device, self._ledgers[device.name], form, backends,
            self._transfer, self._guest_time.pace,
        )  # fmt: skip
        if device.name not in self._watched:
            self._watch_cards()

    def expect_guests(self, asked: ExpectGuests) -> None:
        """Raises `DeviceError` if a card refuses a kernel."""
        form, backends = self._guest_form(asked)
        for name in asked.devices:
            warm_up_lender(self._device(name), form.kinds(asked.heads, softcap=asked.softcap), backends)

    def _guest_form(self, asked: AddGuest | ExpectGuests) -> tuple[GuestForm, AttentionBackends]:
        """What guests have, and what attends for them."""
        if asked.dtype not in DTYPES:
            raise CheckpointError(f"{asked.dtype} is no dtype that models are served in.")
        backends = self._lender_backends
        if backends is None or backends[0] != asked.engine:
            made = AttentionBackends(self._as_served(asked.engine, asked.dtype), CpuThreads(self._cpu_threads))
            backends = self._lender_backends = asked.engine, made
        shapes = {each.layer: KVShape(each.kv_heads, each.key_dim, each.value_dim) for each in asked.layers}
        return GuestForm(shapes, asked.block_size, DTYPES[asked.dtype]), backends[1]

    def keep(self, asked: Keep) -> None:
        """Raises `OutOfDeviceMemoryError`, and `InvalidRequestError` for a stage without pages."""
        placed, kv = self._stage(asked.stage), self._pages(asked.stage)
        self.blocks.keep(asked.memory, placed.parts, asked.slots, kv.page_bytes, pin=placed.device.is_gpu)

    def connect(self, asked: Connect) -> None:
        """From now on the stage computes what the master tells it."""
        placed, (link, path) = self._stage(asked.stage), self._way_to(asked.node)
        leaves = placed.device if path.takes_from(placed.device) else host_device()
        outlet: Outlet
        if asked.node is not None:
            outlet = ToNextStage(RemoteInlet(link, asked.next, leaves, path))
        else:
            outlet = ToMaster(link, asked.stage, RemoteInlet(link, asked.stage, leaves, path) if asked.feeds else None)
        self.hosted[asked.stage] = HostedStage(
            placed.stage, outlet, takes_hidden=asked.takes_hidden, called=asked.called
        )

    def read_pages(self, asked: ReadPages) -> PageBytes:
        """Raises `InvalidRequestError` for pages or layers that are not there."""
        kv = self._kv(asked.stage, asked.layers, asked.pages, asked.place)
        with torch.inference_mode():
            return PageBytes(bytes(kv.pack(asked.place, asked.pages, asked.layers).cpu().numpy().data))

    def write_pages(self, asked: WritePages) -> None:
        """Raises `InvalidRequestError` for pages or layers that are not there, or other bytes than theirs."""
        kv = self._kv(asked.stage, asked.layers, asked.pages, asked.place)
        if len(asked.data) != len(asked.pages) * sum(kv.layer_bytes[layer] for layer in asked.layers):
            raise InvalidRequestError(f"{len(asked.data)} bytes are not those of {len(asked.pages)} pages")
        data = torch.frombuffer(bytearray(asked.data), dtype=torch.uint8).view(len(asked.pages), -1)
        with torch.inference_mode():
            kv.unpack(asked.place, asked.pages, data.to(kv.region(asked.place).device.torch_device), asked.layers)

    def copy_pages(self, asked: CopyPages) -> None:
        """Raises `InvalidRequestError` for pages or layers that are not there."""
        source = self._kv(asked.stage, asked.layers, asked.pages, asked.place)
        target = self._kv(asked.to, asked.layers, asked.others, asked.other_place)
        if len(asked.pages) != len(asked.others):
            raise InvalidRequestError(f"{len(asked.pages)} pages cannot be copied to {len(asked.others)}")
        with torch.inference_mode():
            packed = source.pack(asked.place, asked.pages, asked.layers)
            where = source.region(asked.place).device, target.region(asked.other_place).device
            target.unpack(asked.other_place, asked.others, self._transfer.send(packed, *where), asked.layers)

    def _kv(self, number: int, layers: Sequence[int], pages: Sequence[int], place: int) -> PagedKVCache:
        kv = self._stage(number).stage.kv
        region = kv.regions.get(place) if kv is not None else None
        if kv is None or region is None or not set(layers) <= set(kv.layer_bytes) or max(pages) >= region.num_pages:
            raise InvalidRequestError(f"stage {number} has no such layers or pages")
        return kv

    def _pages(self, number: int) -> PagedKVCache:
        kv = self._stage(number).stage.kv
        if kv is None:
            raise InvalidRequestError(f"stage {number} has no pages yet")
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
        self.guests.close()
        self.blocks.close()

    def uses(self) -> tuple[StageUse, ...]:
        """What the stages have done so far. Any thread."""
        reports = [(number, placed.stage.report()) for number, placed in list(self._placed.items())]
        return tuple(
            StageUse(number, each.forwards, each.busy_s, each.predicted_s, each.stream_wait_s)
            for number, each in reports
        )

    def external_bytes(self) -> dict[str, int]:
        """What other programs take of the devices in use. Any thread. Nothing where a card cannot be asked: steps that
        need it fail, and say so to whoever has to know."""
        try:
            return self._watch.external_bytes()
        except RuntimeError as error:
            if str(error) != self._unwatched:
                self._unwatched = str(error)
                logger.warning("what other programs take of the cards cannot be read", reason=str(error))
            return {}

    def sends_over_lost_links(self) -> bool:
        """Whether the results of some stage have nowhere to go."""
        return any(stage.is_cut_off for stage in list(self.hosted.values()))

    def used_by_purpose(self) -> dict[str, dict[str, int]]:
        """Bytes by device and purpose."""
        ledgers = {**self._ledgers, HOST: self._main}
        return {name: ledger.used_by_purpose() for name, ledger in ledgers.items()}

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
