"""Which layers go on which device. Pure functions over bytes and budgets; no torch here."""

from core.placement.plan import LayerCosts, PlacementPlan, StagePlan
from core.placement.splitter import split_by_memory

__all__ = ["LayerCosts", "PlacementPlan", "StagePlan", "split_by_memory"]
