"""`Regions`: memory that devices lend a model's stages, made where stage and device are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from core.cluster.far_regions import FarRegions
from core.cluster.placed_stage import PlacedRemoteStage
from core.devices import DeviceBudget, machine_of
from core.engine.stages import EngineStage


class Regions:
    """On a device of the stage's machine, or, if machines lend to each other, of another one (`far`)."""

    def __init__(
        self, stages: Sequence[EngineStage], budgets: Mapping[str, DeviceBudget], far: FarRegions | None = None
    ) -> None:
        self._stages = stages
        self._budgets = budgets
        self._far = far

    def add(self, stage: int, region_id: int, device: str, pages: int) -> None:
        """Raises `OutOfDeviceMemoryError`, with nothing kept."""
        budget, placed = self._budgets[device], self._stages[stage]
        if self._far is not None and machine_of(device) != machine_of(placed.device.name):
            self._far.add(stage, placed, region_id, pages, budget)
        elif isinstance(placed, PlacedRemoteStage):
            placed.add_region(region_id, pages, budget)
        else:
            assert placed.kv is not None
            placed.kv.add_region(region_id, pages, budget.device, budget)

    def drop(self, stage: int, region_id: int) -> None:
        """Give a region's memory back."""
        placed = self._stages[stage]
        if self._far is not None and self._far.has(region_id):
            self._far.drop(region_id)
        elif isinstance(placed, PlacedRemoteStage):
            placed.drop_region(region_id)
        else:
            assert placed.kv is not None
            placed.kv.drop_region(region_id)

    def close(self) -> None:
        """The stages are gone, with their regions on their own machines."""
        if self._far is not None:
            self._far.close()
