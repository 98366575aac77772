"""A stage on a worker as the engine has it: loaded, given pages, connected and freed by calls, driven as a
`RemoteStage`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from core.cluster.checkpoints import model_ref
from core.cluster.lending_messages import AddRegion, DropRegion
from core.cluster.master import Master
from core.cluster.messages import Allocate, Connect, CopyPages, Load, ModelRef, ReadPages, Release, WritePages
from core.cluster.node import Node
from core.cluster.remote_stage import RemoteStage
from core.config import Settings
from core.costs import DeviceProfile, LayerCosts, LinkProfile, StagePlan
from core.devices import Device, DeviceBudget
from core.errors import NetworkError, OutOfDeviceMemoryError, VRAMancerError
from core.execution.records import StageReport, StepRecord
from core.execution.stage import KVSetup
from core.grammars.vocabulary import Vocabulary
from core.kv_cache.page_ops import LOCAL, StagePart
from core.kv_cache.paged_kv_cache import PagedKVCache
from core.logs import get_logger
from core.models.architecture import Architecture
from core.models.resolve import ResolvedModel
from core.models.stage_model import StageSlice
from core.quantization.choice import QuantizeChoice
from core.streaming.stream import StreamManager

logger = get_logger(__name__)

WEIGHTS = "weights"


@dataclass(frozen=True, slots=True)
class RemotePages:
    """What the master has to know of a stage's pages. `layer_bytes` is what a page takes, by layer."""

    num_pages: int
    page_bytes: int
    layer_bytes: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class StageOrder:
    """A stage to be loaded on a node. `entrance` is where hidden states leave for it; the rest as in `RemoteStage`.
    `costs`, `profile` and `host_link` are given for emulated devices, the `vocabulary` to the last stage. `lenders` are
    devices of the node that may come to hold pages of it."""

    device: Device
    placed: StagePlan
    entrance: Device
    fed_here: bool
    tells_here: bool
    together: int
    costs: LayerCosts | None
    profile: DeviceProfile | None
    vocabulary: Vocabulary | None = None
    host_link: LinkProfile | None = None
    lenders: tuple[Device, ...] = ()


class PlacedRemoteStage(RemoteStage):
    """See the module. What it takes is on the master's ledgers, of the device (`budget`) and of main memory beside it
    (`host`), as it is on the node's."""

    times = None
    is_loaded = True

    def __init__(
        self, node: Node, number: int, order: StageOrder, part: StageSlice, architecture: Architecture,
        budget: DeviceBudget, host: DeviceBudget, master: Master,
    ) -> None:  # fmt: skip
        super().__init__(
            node.data, number, order.device, order.entrance, master.encoder, fed_here=order.fed_here,
            tells_here=order.tells_here, path=node.path, moved=self._moved,
        )  # fmt: skip
        self._ends = order.entrance.name, order.device.name
        self._transferred = master.transferred
        self.node, self.part, self.device = node, part, order.device
        self.kv: RemotePages | None = None
        self.attention = ""
        self.keeps_bytes = 0
        """Main memory that its node has for what leaves the devices there."""
        self.weight_bytes = 0
        self._budget, self._host = budget, host
        self._streamed_bytes = 0
        self._lenders = tuple(node.devices[device.name].name for device in order.lenders)
        self._regions: dict[int, tuple[DeviceBudget, int]] = {}
        self._architecture = architecture
        self._freed = False
        self._used_s = time.monotonic()

    def _moved(self, nbytes: int, seconds: float) -> None:
        self._transferred(self.node.path.method, *self._ends, nbytes, seconds)

    @property
    def forwards(self) -> int:
        return self._forwards

    @property
    def busy_s(self) -> float:
        """As the node has said last."""
        use = self.node.uses.get(self.number)
        return use.busy_s if use is not None else 0.0

    @property
    def predicted_s(self) -> float:
        """As the node has said last; 0 where the device's speed is not known."""
        use = self.node.uses.get(self.number)
        return use.predicted_s if use is not None else 0.0

    def report(self) -> StageReport:
        """As the node has said last."""
        use = self.node.uses.get(self.number)
        return StageReport(self._forwards, self.busy_s, self.predicted_s, use.stream_wait_s if use is not None else 0.0)

    @property
    def last_used_s(self) -> float:
        """When it was told to compute."""
        return self._used_s

    def begin(self, record: StepRecord, part: StagePart) -> None:
        if record.num_sequences:
            self._used_s = time.monotonic()
        super().begin(record, part)

    def read_weights(self, load: Load) -> None:
        """Raises what loading raises there."""
        self._budget.reserve(WEIGHTS, load.weight_bytes)
        self.weight_bytes = load.weight_bytes
        self._host.reserve(StreamManager.HOST_PURPOSE, load.streamed_bytes)
        self._streamed_bytes = load.streamed_bytes
        self.node.remotes[self.number] = self
        if self.node.lost is not None:  # before it could be told
            self.lose(self.node.lost)
        loaded = self.node.call(load, timeout_s=None)
        further = loaded.weight_bytes - load.weight_bytes
        if further > 0:
            self._budget.reserve(WEIGHTS, further)
            self.weight_bytes = loaded.weight_bytes

    def allocate_kv(self, num_pages: int, setup: KVSetup) -> None:
        """Raises `OutOfDeviceMemoryError`."""
        shapes, element = self._architecture.kv_shapes, self._architecture.dtype.itemsize
        layers = range(self.part.first, self.part.last)
        layer_bytes = {layer: shapes[layer].bytes_per_token(element) * setup.block_size for layer in layers}
        self._budget.reserve(PagedKVCache.PURPOSE, num_pages * sum(layer_bytes.values()))
        asked = Allocate(self.number, num_pages, setup.block_size, setup.table_width, self._lenders)
        there = self.node.call(asked, timeout_s=None)
        self.kv = RemotePages(num_pages, there.page_bytes, layer_bytes)
        self.attention, self.keeps_bytes = there.attention, there.keeps_bytes

    def add_region(self, region_id: int, pages: int, budget: DeviceBudget) -> None:
        """Memory for pages on another device of the node, or in its main memory, whose ledger here is `budget`.

        Raises `OutOfDeviceMemoryError`, with nothing kept, also if the node does not answer: then it lends nothing.
        """
        assert self.kv is not None
        nbytes, there = pages * self.kv.page_bytes, self.node.own_name(budget.device.name)
        budget.reserve(PagedKVCache.LENT, nbytes)
        try:
            self.node.call(AddRegion(self.number, region_id, there, pages))
        except BaseException as error:
            budget.release(PagedKVCache.LENT, nbytes)
            if isinstance(error, NetworkError):
                raise OutOfDeviceMemoryError(f"{budget.device.name}: {error.message}") from error
            raise
        self._regions[region_id] = budget, nbytes

    def drop_region(self, region_id: int) -> None:
        """Give it back. A node that is lost has given up everything."""
        budget, nbytes = self._regions.pop(region_id)
        if self.node.lost is None:
            try:
                self.node.call(DropRegion(self.number, region_id))
            except VRAMancerError as error:
                logger.warning("lent memory could not be freed", device=budget.device.name, reason=error.message)
        budget.release(PagedKVCache.LENT, nbytes)

    def connect(self, following: PlacedRemoteStage | None, *, is_last: bool) -> None:
        """Say where its results go: to `following` on another node, else to the master."""
        node, number = None, 0
        if following is not None:
            self.node.reach(following.node)
            node, number = following.node.id, following.number
        feeds = following is None and not is_last
        self.node.call(Connect(self.number, self.device.name, self.part.first > 0, node, number, feeds))

    def copy_pages(
        self, pages: Sequence[int], to: PlacedRemoteStage, others: Sequence[int], layers: Sequence[int],
        places: tuple[int, int] = (LOCAL, LOCAL),
    ) -> None:  # fmt: skip
        """KV of layers that a stage beside this one has too; `places` are the regions, here and there. Both are at
        rest. Raises what calls raise."""
        asked = CopyPages(self.number, to.number, tuple(layers), tuple(pages), tuple(others), *places)
        self.node.call(asked, timeout_s=None)

    def read_pages(self, pages: Sequence[int], layers: Sequence[int], place: int = LOCAL) -> torch.Tensor:
        """The bytes of some layers, uint8 `[n, bytes]` in main memory; it is at rest. Raises what calls raise."""
        found = self.node.call(ReadPages(self.number, tuple(layers), tuple(pages), place), timeout_s=None)
        return torch.frombuffer(bytearray(found.data), dtype=torch.uint8).view(len(pages), -1)

    def write_pages(self, pages: Sequence[int], data: torch.Tensor, layers: Sequence[int], place: int = LOCAL) -> None:
        """What `read_pages` gives, of another stage perhaps. Raises what calls raise."""
        raw = bytes(data.cpu().contiguous().numpy().data)
        self.node.call(WritePages(self.number, tuple(layers), tuple(pages), raw, place), timeout_s=None)

    def free(self) -> None:
        """Nothing of it is in flight any more. Safe to call twice."""
        if self._freed:
            return
        self._freed = True
        if self.node.lost is None:
            try:
                self.node.call(Release((self.number,)))
            except VRAMancerError as error:
                logger.warning("a stage could not be freed", device=self.device.name, reason=error.message)
        self.node.remotes.pop(self.number, None)
        for budget, nbytes in self._regions.values():
            budget.release(PagedKVCache.LENT, nbytes)
        self._regions.clear()
        for purpose in (WEIGHTS, PagedKVCache.PURPOSE):
            self._budget.release(purpose)
        self._host.release(StreamManager.HOST_PURPOSE, self._streamed_bytes)
        self._streamed_bytes, self.kv = 0, None


class RemoteStages:
    """Loads stages of one model on the nodes of a master."""

    def __init__(self, master: Master, resolved: ResolvedModel, architecture: Architecture, settings: Settings) -> None:
        self.master = master
        self._architecture = architecture
        self._engine = settings.engine.model_dump(mode="json")
        self._quantize = QuantizeChoice.of(settings.model).text
        self._resolved = resolved
        self._ref: ModelRef | None = None

    @property
    def model(self) -> ModelRef:
        """What nodes are told of the model; they may fetch its files from now on."""
        if self._ref is None:
            resolved, dtype = self._resolved, str(self._architecture.dtype).removeprefix("torch.")
            self._ref = model_ref(resolved.name, resolved.path, resolved.revision, dtype, self._quantize)
            self.master.checkpoints.add(self._ref.digest, resolved.path, self._ref.files)
        return self._ref

    @property
    def engine(self) -> dict[str, object]:
        """The engine's settings, as nodes are told them."""
        return self._engine

    def takes_from(self, here: Device, there: Device) -> bool:
        """Whether hidden states go from a GPU of this process to the node of another device past main memory."""
        return self.master.node_of(there).path.takes_from(here)

    def load(self, order: StageOrder, budget: DeviceBudget, host: DeviceBudget) -> PlacedRemoteStage:
        """Raises what loading raises; nothing is kept then."""
        node, layers, placed = self.master.node_of(order.device), self._architecture.num_layers, order.placed
        part = StageSlice(placed.first_layer, placed.last_layer, layers)
        number = self.master.new_stage()
        stage = PlacedRemoteStage(node, number, order, part, self._architecture, budget, host, self.master)
        request = Load(
            stage.number, self.model, node.devices[order.device.name].name, part.first, part.last, layers,
            placed.weight_bytes, placed.workspace_bytes, order.together, self._engine, order.costs, order.profile,
            order.vocabulary, placed.streamed_layers, placed.streamed_bytes, placed.slot_bytes, order.host_link,
        )  # fmt: skip
        try:
            stage.read_weights(request)
        except BaseException:
            stage.free()
            raise
        return stage


def connect_stages(stages: Sequence[object]) -> None:
    """Tell the stages on nodes where their results go, once all have their pages."""
    placed = [stage for stage in stages if isinstance(stage, PlacedRemoteStage)]
    for number, each in enumerate(placed):
        each.precedes(placed[number + 1 :])
    for index, stage in enumerate(stages):
        if isinstance(stage, PlacedRemoteStage):
            following = stages[index + 1] if index + 1 < len(stages) else None
            remote = following if isinstance(following, PlacedRemoteStage) else None
            stage.connect(remote, is_last=following is None)
