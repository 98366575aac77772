"""The parts of blocks that workers keep beside the stages they compute, as the master's tiers know them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core.cluster.block_wire import BlockRef
from core.cluster.master import Master
from core.cluster.messages import Keep, Release
from core.cluster.node import Node
from core.cluster.placed_stage import PlacedRemoteStage
from core.errors import NetworkError, VRAMancerError
from core.logs import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class StageBytes:
    """A stage on another machine, and where its layers are in a block's bytes."""

    stage: PlacedRemoteStage
    at: slice


@dataclass(frozen=True, slots=True)
class _Part:
    node: Node
    memory: int
    at: slice


def common_slots(stages: Sequence[StageBytes]) -> tuple[int, str]:
    """How many blocks all machines have room for the parts of, and the one that has least."""
    needed: dict[str, int] = {}
    offered: dict[str, int] = {}
    for each in stages:
        name = each.stage.node.name
        needed[name] = needed.get(name, 0) + each.at.stop - each.at.start
        offered[name] = min(offered.get(name, each.stage.keeps_bytes), each.stage.keeps_bytes)
    least = min(needed, key=lambda name: offered[name] // needed[name])
    return offered[least] // needed[least], least


class PlacedParts:
    """See `RemoteParts`. Opened once the stages have their pages, with `num_slots` slots for each; they may be freed
    before this is closed."""

    def __init__(self, master: Master, stages: Sequence[StageBytes], num_slots: int) -> None:
        """Raises what calls raise; then nothing is kept."""
        self.num_slots = num_slots
        self._parts: list[_Part] = []
        try:
            for each in stages:
                number, node = master.new_stage(), each.stage.node
                node.call(Keep(number, each.stage.number, num_slots), timeout_s=None)
                node.kept.add(number)
                self._parts.append(_Part(node, number, each.at))
        except BaseException:
            self.close()
            raise

    @property
    def machines(self) -> int:
        return len({part.node.id for part in self._parts})

    @property
    def slowest_bytes_s(self) -> float:
        """Of the links to the machines, as they were measured."""
        return max(1.0, min(part.node.speed.bandwidth_bytes_s for part in self._parts))

    @property
    def latency_s(self) -> float:
        """Until all have been asked."""
        return sum(part.node.speed.latency_s for part in self._parts)

    @property
    def nbytes(self) -> int:
        """Of a block."""
        return sum(part.at.stop - part.at.start for part in self._parts)

    def get(self, slot: int, block: bytes, payload: memoryview) -> bool:
        """See `RemoteParts`."""
        try:
            for part in self._parts:
                target = payload[part.at]
                data = part.node.block_calls.get(part.memory, BlockRef(block, slot), len(target))
                if data is None or len(data) != len(target):
                    return False
                target[:] = data
        except NetworkError as error:  # whoever computes there hears of it, too
            logger.debug("a part of a block is gone", block=block.hex(), reason=error.message)
            return False
        return True

    def put(self, slot: int, block: bytes, payload: memoryview) -> bool:
        """See `RemoteParts`."""
        try:
            return all(
                part.node.block_calls.put(part.memory, BlockRef(block, slot), payload[part.at]) for part in self._parts
            )
        except NetworkError as error:
            logger.debug("a part of a block is not kept", block=block.hex(), reason=error.message)
            return False

    def close(self) -> None:
        """See `RemoteParts`."""
        parts, self._parts = self._parts, []
        for part in parts:
            if part.node.lost is None:
                try:
                    part.node.call(Release((part.memory,)))
                except VRAMancerError as error:
                    logger.warning("parts of blocks could not be freed", node=part.node.name, reason=error.message)
            part.node.kept.discard(part.memory)
