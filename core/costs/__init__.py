"""Speeds and sizes, and what follows for a step: profiles, the cost model, plan records, cards. Pure; no torch."""

from core.costs.cost import Batch, StageCost, StageTimer
from core.costs.model import ModelBytes, Workspace
from core.costs.plan import SLOTS, Experts, LayerCosts, PlacementDevice, PlacementPlan, PlacementProblem, StagePlan
from core.costs.profile import DeviceProfile, LinkProfile, LinkTopology, Sharing, emulated_profile

__all__ = [
    "SLOTS",
    "Batch",
    "DeviceProfile",
    "Experts",
    "LayerCosts",
    "LinkProfile",
    "LinkTopology",
    "ModelBytes",
    "PlacementDevice",
    "PlacementPlan",
    "PlacementProblem",
    "Sharing",
    "StageCost",
    "StagePlan",
    "StageTimer",
    "Workspace",
    "emulated_profile",
]
