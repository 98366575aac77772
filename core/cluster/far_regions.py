"""Memory that devices of one machine lend stages on another, as the master arranges it: there the guest, here the
region.

The ledger of the lender is the master's for a node's device, as for all that it places there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from core.cluster.guest_calls import FarDevice
from core.cluster.guests import GuestForm, Pace
from core.cluster.lending_messages import AddGuest, Borrow, DropGuest, DropRegion, ExpectGuests, LayerPages, WorkerPlace
from core.cluster.master import Master
from core.cluster.node import Node
from core.cluster.placed_stage import PlacedRemoteStage
from core.devices import Device, DeviceBudget
from core.errors import OutOfDeviceMemoryError, VRAMancerError
from core.execution.attention.warm_up import warm_up_lender
from core.execution.site_attention import BackendOf
from core.execution.stage import Stage
from core.kv_cache.paged_kv_cache import PagedKVCache
from core.logs import get_logger
from core.models.architecture import Architecture
from core.transfer import TransferManager

logger = get_logger(__name__)

Borrower: TypeAlias = Stage | PlacedRemoteStage


@dataclass(frozen=True, slots=True)
class LenderHere:
    """With what devices of this process attend for stages elsewhere."""

    backend_of: BackendOf
    transfer: TransferManager
    pace: Pace


@dataclass(frozen=True, slots=True)
class _Loan:
    stage: Borrower
    guest: int
    budget: DeviceBudget
    node: Node | None
    nbytes: int


class FarRegions:
    """Of one engine, whose settings nodes are told as `engine`. Used by the engine thread."""

    def __init__(
        self, master: Master, architecture: Architecture, block_size: int, engine: Mapping[str, Any], here: LenderHere
    ) -> None:
        self._master = master
        self._architecture = architecture
        self._block_size = block_size
        self._engine = dict(engine)
        self._here = here
        self._loans: dict[int, _Loan] = {}
        self._guests: dict[int, int] = {}
        self._far: dict[tuple[int, str], FarDevice] = {}

    def prepare(self, stages: Sequence[Borrower], pairs: Iterable[tuple[str, str]], devices: Sequence[Device]) -> None:
        """Have lenders make ready what attention they will be asked for; `pairs` are devices of borrowers and lenders.
        Raises `DeviceError` if a card refuses a kernel, and what calls raise."""
        borrowers = {stage.device.name: stage for stage in stages}
        lenders = {device.name: device for device in devices}
        softcap = bool(getattr(self._architecture.config.get_text_config(), "attn_logit_softcapping", None))
        for borrower, lender in pairs:
            form, device = self._form(borrowers[borrower]), lenders[lender]
            if device.is_here:
                warm_up_lender(device, form.kinds(self._architecture.num_heads, softcap=softcap), self._here.backend_of)
                continue
            node, (layers, dtype) = self._master.node_of(device), _told(form)
            asked = ExpectGuests(
                (node.own_name(lender),), layers, self._architecture.num_heads, softcap, form.block_size, dtype,
                self._engine,
            )  # fmt: skip
            node.call(asked, timeout_s=None)

    def add(self, index: int, stage: Borrower, region_id: int, pages: int, budget: DeviceBudget) -> None:
        """Memory for pages of stage number `index`, on a device of another machine whose ledger is `budget`. Raises
        `OutOfDeviceMemoryError`, with nothing kept, also if somebody does not answer."""
        device = budget.device
        try:
            node = None if device.is_here else self._master.node_of(device)
            loan = self._host(index, stage, region_id, pages, budget, node)
            try:
                self._borrow(index, stage, region_id, pages, loan)
            except BaseException:
                self._let_go(region_id, loan)
                raise
        except OutOfDeviceMemoryError:
            raise
        except VRAMancerError as error:
            raise OutOfDeviceMemoryError(f"{device.name}: {error.message}") from error
        self._loans[region_id] = loan

    def _host(
        self, index: int, stage: Borrower, region_id: int, pages: int, budget: DeviceBudget, node: Node | None
    ) -> _Loan:
        """The lender's half."""
        form, guest = self._form(stage), self._guest_of(index, stage)
        page_bytes = sum(form.block_size * shape.bytes_per_token(form.dtype.itemsize) for shape in form.shapes.values())
        loan = _Loan(stage, guest, budget, node, pages * page_bytes)
        if node is None:
            self._master.guests.add(
                guest, region_id, pages, budget.device, budget, form, self._here.backend_of, self._here.transfer,
                self._here.pace,
            )  # fmt: skip
            return loan
        budget.reserve(PagedKVCache.LENT, loan.nbytes)
        layers, dtype = _told(form)
        asked = AddGuest(
            guest, region_id, node.own_name(budget.device.name), pages, layers, form.block_size, dtype, self._engine
        )
        node.lends.add((guest, region_id))
        try:
            node.call(asked)
        except BaseException:
            node.lends.discard((guest, region_id))
            budget.release(PagedKVCache.LENT, loan.nbytes)
            raise
        return loan

    def _borrow(self, index: int, stage: Borrower, region_id: int, pages: int, loan: _Loan) -> None:
        """The borrower's half."""
        name, node = loan.budget.device.name, loan.node
        if isinstance(stage, PlacedRemoteStage):
            at = WorkerPlace(node.id, node.address, node.info.port) if node is not None else None
            stage.node.call(Borrow(stage.number, region_id, pages, name, at))
            return
        assert node is not None
        far = self._far.get((index, name))
        if far is None or far.is_over:
            form = self._form(stage)
            calls = self._master.borrow_from(node)
            far = FarDevice(calls, loan.guest, name, form.shapes, form.block_size, form.dtype)
            self._far[index, name] = far
        stage.borrow_far(region_id, pages, far)

    def _form(self, stage: Borrower) -> GuestForm:
        shapes = {layer: self._architecture.kv_shapes[layer] for layer in range(stage.part.first, stage.part.last)}
        return GuestForm(shapes, self._block_size, self._architecture.dtype)

    def _guest_of(self, index: int, stage: Borrower) -> int:
        """A stage here gets a number like those of stages on nodes."""
        if isinstance(stage, PlacedRemoteStage):
            return stage.number
        if index not in self._guests:
            self._guests[index] = self._master.new_stage()
        return self._guests[index]

    def has(self, region_id: int) -> bool:
        """Whether the region is one of these."""
        return region_id in self._loans

    def drop(self, region_id: int) -> None:
        """Give a region back; nothing in flight uses it."""
        loan = self._loans.pop(region_id)
        stage = loan.stage
        if isinstance(stage, PlacedRemoteStage):
            if stage.node.lost is None:
                _try(stage.node, DropRegion(stage.number, region_id))
        else:
            assert stage.kv is not None
            stage.kv.drop_region(region_id)
        self._let_go(region_id, loan)

    def _let_go(self, region_id: int, loan: _Loan) -> None:
        """The lender's half."""
        if loan.node is None:
            self._master.guests.drop(loan.guest, region_id)
            return
        if loan.node.lost is None:
            _try(loan.node, DropGuest(loan.guest, region_id))
        loan.node.lends.discard((loan.guest, region_id))
        loan.budget.release(PagedKVCache.LENT, loan.nbytes)

    def close(self) -> None:
        """The stages are gone, and their regions with them: so are the guests."""
        for region_id, loan in self._loans.items():
            self._let_go(region_id, loan)
        self._loans.clear()


def _told(form: GuestForm) -> tuple[tuple[LayerPages, ...], str]:
    """As nodes are told it."""
    layers = tuple(
        LayerPages(layer, each.num_kv_heads, each.key_dim, each.value_dim) for layer, each in form.shapes.items()
    )
    return layers, str(form.dtype).removeprefix("torch.")


def _try(node: Node, asked: DropRegion | DropGuest) -> None:
    try:
        node.call(asked)
    except VRAMancerError as error:
        logger.warning("lent memory could not be freed", node=node.name, reason=error.message)
